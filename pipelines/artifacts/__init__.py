"""What stages leave and find: the workspace, work over shards, rows, files, manifests and reports."""

import fsspec

fsspec.register_implementation(
    "oss", "pipelines.artifacts.oss.OssFileSystem", clobber=True, errtxt="oss:// needs oss2: pip install 'danlu[cloud]'"
)
