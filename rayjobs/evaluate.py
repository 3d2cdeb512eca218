"""Score the models with evalscope, after what is missing before it; the work is in pipelines/evaluate/stage.py.

python -m rayjobs.evaluate RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("evaluate")
