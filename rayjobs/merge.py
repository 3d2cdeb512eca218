"""Merge the adapter into the base model, after what is missing before it; the work is in pipelines/train/merge.py.

python -m rayjobs.merge RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("merge")
