"""Clean the rows by the recipe's operators, after what is missing before it; the work is in pipelines/clean/stage.py.

python -m rayjobs.clean RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("clean")
