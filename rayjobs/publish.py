"""Write model and data set as folders for a hub and upload them, after what is missing before it.

python -m rayjobs.publish RECIPE [--workspace FOLDER|URL] [key=value ...]

The work is in pipelines/publish/.
"""

from rayjobs.cli import run_stage

if __name__ == "__main__":
    run_stage("publish")
