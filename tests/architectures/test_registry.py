import timm
from timm.models import model_entrypoint

import foveal.architectures  # noqa: F401
from foveal.architectures._registry import register_model


def test_a_name_that_timm_has_stays_timms():
    def resnet18(pretrained=False, **kwargs):
        raise AssertionError("never called")

    before = model_entrypoint("resnet18")
    assert register_model(resnet18) is before
    assert model_entrypoint("resnet18") is before
    assert timm.create_model("resnet18", num_classes=3).num_classes == 3
