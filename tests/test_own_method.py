"""The method that README shows is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from toys import ToySuite

from lit_merge import MergeTrainer, TaskDataModule
from lit_merge.callbacks import ResumePoint, SequentialMerging

README = Path(__file__).parent.parent / "README.md"


def own_method(base: str = "MergeModule") -> tuple[str, dict[str, Any]]:
    """Source of README's class, and what it defines."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    source = next(block for block in blocks if f"({base})" in block)
    names: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), names)
    return source, names


def test_it_is_short() -> None:
    lines = [line for line in own_method()[0].splitlines() if line.strip()]
    assert len(lines) <= 25


def test_it_learns_and_resumes(tmp_path: Path) -> None:
    from testers import TINY

    method = own_method()[1]["NormScaled"]
    suite = ToySuite("vit")
    module = method(suite=suite)
    trainer = MergeTrainer(**{**TINY, "max_epochs": 2})
    trainer.fit(module, datamodule=TaskDataModule(suite, batch_size=8, steps_per_epoch=5))
    before = method(suite=suite)
    before.configure_model()
    assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), before.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = method.load_from_checkpoint(tmp_path / "own.ckpt", suite=suite)
    first, second = module.merged_state(), again.merged_state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stream_of_ones_own(tmp_path: Path) -> None:
    from streams import Case

    source, names = own_method("SequentialModule")
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    suite = ToySuite("mlp")
    model = names["Decay"](suite=suite, rate=0.25)
    Case().trainer(tmp_path, SequentialMerging(evaluate="none"), ResumePoint()).fit(model)
    base, (a, b, c) = suite.base(), (suite.expert(task) for task in suite.tasks)
    for name, value in model.merged_state().items():
        torch.testing.assert_close(value, 0.75 * (0.75 * a[name] + 0.25 * b[name]) + 0.25 * c[name])
        assert not torch.equal(value, base[name])
