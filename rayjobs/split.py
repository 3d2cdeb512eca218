"""Hold rows out for testing, after what is missing before it; the work is in pipelines/split.py.

python -m rayjobs.split RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("split")
