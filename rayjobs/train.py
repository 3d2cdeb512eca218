"""Fine-tune the model, after what is missing before it; the work is in pipelines/train/stage.py.

python -m rayjobs.train RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("train")
