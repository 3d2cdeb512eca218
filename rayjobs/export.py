"""Export the rows as one file, after what is missing before it; the work is in pipelines/export/.

python -m rayjobs.export RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("export")
