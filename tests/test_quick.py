"""What `tests/quick.py` leaves out changes no setting that is read."""

from __future__ import annotations

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch.utils._config_module import ConfigModule

from tests.quick import READ, setting

CONFIGS = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)


def read(config: ConfigModule, name: str, how: object) -> object:
    try:
        return how(config, name)  # type: ignore[operator]
    except AttributeError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_a_setting_is_that_of_torch(config: ConfigModule) -> None:
    names = [*config._config, "of_no_such_name"]
    assert len(names) > 30
    assert [read(config, name, setting) for name in names] == [read(config, name, READ) for name in names]


def test_a_setting_that_is_changed_is_read_so_and_as_before_afterwards() -> None:
    config = torch._inductor.config
    before = [setting(config, "max_fusion_size"), setting(config, "cpp.threads"), config.cpp.threads]
    with config.patch({"max_fusion_size": 3, "cpp.threads": 5}):
        assert [setting(config, "max_fusion_size"), setting(config, "cpp.threads"), config.cpp.threads] == [3, 5, 5]
    assert [setting(config, "max_fusion_size"), setting(config, "cpp.threads"), config.cpp.threads] == before
