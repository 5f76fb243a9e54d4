"""The house keeps its rules, and each rule can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / house.PACKAGE
OPTIONAL = ("triton", "datasets", "matplotlib", "peft")

#: rule, file in the package, source, what the violation says
VIOLATIONS = [
    (house.import_table, "ops/x.py", "from flash_reformer.layers import attention", "ops imports layers"),
    (house.import_table, "ops/x.py", "from ..layers import attention", "ops imports layers"),
    (house.import_table, "ops/x.py", "from .. import functional", "ops imports functional"),
    (house.import_table, "ops/x.py", "from ... import y", "outside of the package"),
    (house.import_table, "ops/x.py", "import flash_reformer", "ops imports root"),
    (house.import_table, "ops/x.py", "def f():\n    import numpy", "ops imports numpy"),
    (
        house.import_table,
        "ops/x.py",
        "class A:\n    def f(self):\n        from ..models import y",
        "ops imports models",
    ),
    (house.import_table, "ops/x.py", "import importlib\nimportlib.import_module('flash_reformer.cli')", "imports cli"),
    (house.import_table, "ops/x.py", "from importlib import import_module as im\nim('..cli', __package__)", "cli"),
    (house.import_table, "ops/x.py", "__import__('transformers')", "ops imports transformers"),
    (house.import_table, "ops/x.py", "__import__('trans' + 'formers')", "computed name"),
    (house.import_table, "kernels/cpu/x.py", "from flash_reformer.ops import sorting", "imports ops"),
    (house.import_table, "kernels/cpu/x.py", "from ..triton import sorting", "imports kernels/triton"),
    (house.import_table, "kernels/triton/x.py", "from ...ops.sorting import f", "imports ops"),
    (house.import_table, "kernels/triton/x.py", "from flash_reformer.kernels import cpu", "imports kernels/cpu"),
    (house.import_table, "kernels/cpu/x.py", "import triton", "kernels/cpu imports triton"),
    (house.import_table, "functional.py", "from .kernels.triton import sorting", "kernels/triton outside a function"),
    (house.import_table, "functional.py", "from .layers import head", "functional imports layers"),
    (house.import_table, "reversible.py", "from .functional import f", "reversible imports functional"),
    (house.import_table, "layers/x.py", "from ..ops import hashing", "layers imports ops"),
    (house.import_table, "layers/x.py", "import transformers", "layers imports transformers"),
    (house.import_table, "models/x.py", "from ..ops.loss import f", "models imports ops"),
    (house.import_table, "models/x.py", "from ..reversible import f", "models imports reversible"),
    (house.import_table, "models/x.py", "def f():\n    import numpy", "models imports numpy"),
    (house.import_table, "tokenization/x.py", "import torch", "tokenization imports torch"),
    (house.import_table, "training/x.py", "import datasets", "datasets outside a function"),
    (house.import_table, "training/x.py", "from matplotlib import pyplot", "matplotlib outside a function"),
    (house.import_table, "training/x.py", "import typer", "training imports typer"),
    (house.import_table, "cli/x.py", "from ..ops import hashing", "cli imports ops"),
    (house.import_table, "__init__.py", "from .training import data", "root imports training"),
    (house.import_table, "utils/x.py", "", "no such room: utils"),
    (house.foreign_reformer, "models/x.py", "from transformers.models.reformer import modeling_reformer", "uses"),
    (house.foreign_reformer, "models/x.py", "def f():\n    from transformers.models import reformer", "uses"),
    (house.foreign_reformer, "models/x.py", "from transformers import ReformerModel", "uses"),
    (house.foreign_reformer, "models/x.py", "import transformers\nx = transformers.ReformerConfig()", "uses"),
    (house.foreign_reformer, "cli/x.py", "__import__('transformers.models.reformer')", "uses"),
    (house.file_sizes, "models/x.py", "\n" * (house.FILE_LIMIT + 1), "401 lines"),
    (house.function_sizes, "models/x.py", "def f():\n" + "    1\n" * 80, "f has 81 lines"),
    (house.function_sizes, "ops/x.py", "def f():\n" + "    1\n" * 60, "f has 61 lines"),
    (house.printing, "training/x.py", "def f():\n    print('loss')", "prints"),
    (house.printing, "models/x.py", "import sys\nsys.stdout.write('x')", "prints"),
    (house.environment, "ops/x.py", "import os\nx = os.environ['X']", "environment"),
    (house.environment, "functional.py", "import os\ndef f():\n    return os.getenv('X')", "environment"),
    (house.environment, "layers/x.py", "from os import environ", "environment"),
    (house.synchronisation, "ops/x.py", "def f(x):\n    return x.sum().item()", "item"),
    (house.synchronisation, "kernels/cpu/x.py", "def f(x):\n    return x.tolist()", "tolist"),
    (house.synchronisation, "layers/x.py", "def f(x):\n    return torch.nonzero(x)", "nonzero"),
    (house.synchronisation, "layers/x.py", "def f(x, m):\n    return x.masked_select(m)", "masked_select"),
    (house.synchronisation, "layers/x.py", "def f(x):\n    return x.cpu()", "cpu"),
    (house.synchronisation, "layers/x.py", "def f(x):\n    return torch.where(x > 0)", "where"),
    (house.synchronisation, "layers/x.py", "def f(x, mask_BT):\n    return x[:, mask_BT]", "indexes by a mask"),
    (house.synchronisation, "layers/x.py", "def f(x):\n    x[x < 0] = 0", "indexes by a mask"),
    (house.synchronisation, "layers/x.py", "def f(x, keep):\n    return x[~keep]", "indexes by a mask"),
    (house.purity, "ops/x.py", "from torch import nn\nclass A(nn.Module):\n    pass", "nn.Module"),
    (house.purity, "kernels/cpu/x.py", "from torch.nn import Module", "nn.Module"),
    (house.purity, "ops/x.py", "def f():\n    torch.manual_seed(0)", "torch.manual_seed"),
    (house.purity, "ops/x.py", "def f():\n    torch.seed()", "torch.seed"),
    (house.purity, "ops/x.py", "def f():\n    return torch.randn(3)", "torch.randn"),
    (house.purity, "ops/x.py", "def f(x):\n    return F.dropout(x, 0.1)", "F.dropout"),
    (house.purity, "ops/x.py", "def f(x):\n    return torch.empty_like(x).normal_()", "normal_"),
    (house.purity, "ops/x.py", "def f(x):\n    return x.mul_(2)", "its input x"),
    (house.purity, "ops/x.py", "def f(x):\n    x[0].view(-1).zero_()", "its input x"),
    (house.purity, "ops/x.py", "def f(x, y):\n    torch.add(x, y, out=y)", "its input y"),
    (house.purity, "ops/x.py", "def f(x, *, y):\n    y[:, 0] = x", "its input y"),
    (house.purity, "kernels/cpu/x.py", "def f(x: Tensor):\n    x += 1", "its input x"),
    (house.purity, "ops/x.py", "def f(x):\n    def g():\n        x.add_(1)", "its input x"),
    (house.kernel_twins, "kernels/cpu/sorting.py", "def sort(x): ...", "no definition in ops/sorting.py"),
    (house.kernel_twins, "kernels/triton/twin.py", "def f(x: Tensor, *, k: int = 1) -> Tensor: ...", "differs"),
    (house.kernel_twins, "kernels/triton/twin.py", "def f(x: Tensor, k: int = 1): ...", "differs"),
]

#: file in the package, source that no rule may object to
INNOCENT = [
    ("ops/x.py", "from __future__ import annotations\nimport math\nimport torch.nn.functional as F\nfrom . import y"),
    ("ops/x.py", "def f(x: Tensor, n: int):\n    n += 1\n    y = x.clone()\n    y.mul_(n)\n    return y[:, 0]"),
    (
        "ops/x.py",
        "def f(seed):\n    g = torch.Generator()\n    g.manual_seed(seed)\n    return torch.randn(3, generator=g)",
    ),
    ("ops/x.py", "def f(ctx, x):\n    ctx.save_for_backward(x)\n    ctx.n = 3\n    return torch.where(x > 0, x, 0)"),
    ("kernels/cpu/x.py", "import numpy\nfrom .sorting import f as _f"),
    ("kernels/triton/x.py", "import triton.language as tl\ndef f_fwd_kernel(x_ptr):\n    x_ptr += tl.program_id(0)"),
    ("kernels/cpu/twin.py", "def f(x: Tensor, k: int = 1) -> Tensor: ...\ndef _helper(x): ..."),
    ("functional.py", "from .ops import hashing\ndef f():\n    from .kernels.cpu import sorting"),
    (
        "training/x.py",
        "def f():\n    import datasets\n    from matplotlib import pyplot\n    import os\n    os.environ",
    ),
    ("cli/x.py", "import typer\nfrom flash_reformer import ReformerConfig\nprint('x')"),
    ("models/x.py", "from transformers.models.auto import configuration_auto\nfrom ..functional import f"),
    ("__init__.py", "from .models.configuration_reformer import ReformerConfig"),
]


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    assert house.sources(PACKAGE), "nothing to judge"
    assert rule(PACKAGE) == []


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_files_outside_the_package_are_small(folder):
    assert house.file_sizes(ROOT / folder) == []


@pytest.mark.parametrize(("rule", "path", "source", "message"), VIOLATIONS)
def test_a_planted_violation_is_found(rule, path, source, message, tmp_path):
    _plant(tmp_path, path, source)
    found = rule(tmp_path)
    assert len(found) == 1
    assert path in found[0]
    assert message in found[0]


@pytest.mark.parametrize(("path", "source"), INNOCENT)
def test_innocent_code_passes(path, source, tmp_path):
    _plant(tmp_path, path, source)
    assert [violation for rule in house.RULES for violation in rule(tmp_path)] == []


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, *_ in VIOLATIONS} == set(house.RULES)


def _plant(package: Path, path: str, source: str) -> None:
    twin = "def f(x: Tensor, k: int = 1) -> Tensor: ..."
    for name, text in {"ops/twin.py": twin, path: source}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, "utf-8")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def _without_optional(code: str) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); {code}"


@pytest.mark.floor
def test_import_is_silent():
    done = _run("import flash_reformer")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.floor
def test_import_works_without_optional_packages():
    done = _run(_without_optional("import flash_reformer"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_blocked_package_cannot_be_imported(name):
    assert "ModuleNotFoundError" in _run(_without_optional(f"import {name}")).stderr
