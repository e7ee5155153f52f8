"""The server as an attacker meets it; bad requests are in tests/ship/serve."""

import pytest

from foveal.core.errors import BundleError, DataError
from foveal.ship.serve.explain import Explainer
from foveal.ship.serve.refusal import Refused


def test_what_is_wrong_with_the_servers_own_files_is_not_told_to_clients(monkeypatch: pytest.MonkeyPatch):
    explainer = Explainer.__new__(Explainer)
    asked = ("image", b"", "eigen-cam", None, 0.0)

    def fails(error: Exception) -> None:
        def compute(*_: object) -> None:
            raise error

        monkeypatch.setattr(Explainer, "_compute", compute)

    fails(BundleError("Bundle /srv/models/secret lacks model.safetensors"))
    with pytest.raises(BundleError):  # becomes status 500 and a line in the log
        explainer.compute(*asked)
    fails(DataError("the image is empty"))
    with pytest.raises(Refused, match="the image is empty"):
        explainer.compute(*asked)
