"""Describe the rows by the statistics of the recipe's filters; the work is in pipelines/clean/analyze.py.

python -m rayjobs.analyze RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("analyze")
