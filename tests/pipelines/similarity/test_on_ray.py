"""Workers find what one process finds."""

import numpy as np
import pytest

from pipelines.similarity import on_ray
from pipelines.similarity.hamming import first_of_near
from tests.pipelines.similarity.test_hamming import clustered


@pytest.mark.usefixtures("ray_cluster")
def test_workers_find_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = clustered(11, 3000)
    alone = first_of_near(signatures, 6)
    monkeypatch.setattr(on_ray, "ALONE", 100)
    assert (first_of_near(signatures, 6, on_ray.find_near) == alone).all()
    assert len(np.unique(alone)) < 3000
