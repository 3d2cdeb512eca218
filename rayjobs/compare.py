"""Ask every model the same questions, after what is missing before it; the work is in pipelines/evaluate/compare.py.

python -m rayjobs.compare RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("compare")
