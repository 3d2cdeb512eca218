"""Read a source into canonical rows, after what is missing before it; the work is in pipelines/ingest/stage.py.

python -m rayjobs.ingest RECIPE [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("ingest")
