import subprocess
import sys

import pytest

from foveal.core import catalogue
from foveal.core.errors import UsageError


def test_every_file_is_a_method_of_its_name():
    assert catalogue.names()
    for name in catalogue.names():
        cls = catalogue.get(name)
        assert cls.name == name
        assert cls.spec.family == catalogue.families()[name]


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(UsageError, match="did you mean linear"):
        catalogue.get("liner")


def test_listing_names_imports_no_torch():
    code = "import sys; from foveal.core import catalogue; catalogue.names(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
