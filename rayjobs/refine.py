"""Drop or mend what a model got wrong, by name; the work is in pipelines/refine/stage.py.

python -m rayjobs.refine RECIPE [--export FILE] [--workspace FOLDER|URL] [key=value ...]
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("refine")
