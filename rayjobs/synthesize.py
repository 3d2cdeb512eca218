"""Ask a model for the recipe's grid of conversations; the work is in pipelines/synthesize/stage.py.

python -m rayjobs.synthesize RECIPE [--dry-run N] [--retry-failed] [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("synthesize")
