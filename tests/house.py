"""The rules of the house, each a pure function from a source tree to a list of violations.

ARCHITECTURE.md states them for people; here they are executable. A rule reads files with ``ast`` and imports nothing,
so it also judges code that this machine could not run. ``test_house.py`` plants a violation of each.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "flash_reformer"
FILE_LIMIT = 400
FUNCTION_LIMIT = 80
OPS_FUNCTION_LIMIT = 60


@dataclass(frozen=True)
class Room:
    """What a room may import; ``lazily`` means inside a function only. Its own files and the stdlib always."""

    inside: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()


def _room(inside: str = "", outside: str = "", lazily: str = "") -> Room:
    return Room(frozenset(inside.split()), frozenset(outside.split()), frozenset(lazily.split()))


#: The import table. ``root`` is ``flash_reformer/__init__.py``; ``kernels`` is the file that only holds the two rooms.
ROOMS = {
    "root": _room("models tokenization", "torch transformers"),
    "ops": _room("", "torch"),
    "kernels": _room(),
    "kernels/cpu": _room("buffers", "torch numpy"),
    "kernels/triton": _room("", "torch triton"),
    "functional": _room("ops kernels kernels/cpu", "torch", lazily="kernels/triton"),
    "buffers": _room("", "torch"),
    "residual": _room("buffers", "torch"),
    "seeds": _room("", "torch"),
    "branches": _room("buffers residual seeds", "torch"),
    "reversible": _room("branches buffers residual seeds", "torch"),
    "layers": _room("functional branches reversible seeds", "torch"),
    "models": _room("layers functional", "torch transformers"),
    "distributed": _room("functional reversible layers", "torch"),
    "inspection": _room("functional models", "torch", lazily="matplotlib"),
    "tokenization": _room("", "transformers tokenizers sentencepiece"),
    "training": _room(
        "buffers models tokenization",
        "torch transformers accelerate numpy rich safetensors",
        lazily="distributed datasets matplotlib",
    ),
    "cli": _room(
        "root functional layers models distributed inspection tokenization training", "torch transformers typer rich"
    ),
}

PURE = ("ops", "kernels")
NO_ENVIRONMENT = (*PURE, "functional", "branches", "reversible", "layers", "models")
NO_SYNC = (*PURE, "layers")
SYNCHRONISING = frozenset("item tolist nonzero argwhere masked_select unique unique_consecutive cpu".split())
RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson dropout".split()
)
RANDOM_IN_PLACE = frozenset("uniform_ normal_ bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_".split())
VIEWS = frozenset("view reshape transpose permute flatten unflatten squeeze unsqueeze expand narrow select".split())
PRINTING = ("print", "pprint", "pprint.pprint", "sys.stdout.write", "sys.stderr.write")
DYNAMIC_IMPORTS = ("import_module", "__import__")


@dataclass(frozen=True)
class Source:
    """One parsed file of the package."""

    path: Path
    room: str
    tree: ast.Module

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


def sources(package: Path) -> list[Source]:
    """Parse every file of the package folder, in a fixed order."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found.append(Source(path.relative_to(package), _room_of(parts), ast.parse(path.read_text("utf-8"))))
    return found


def _room_of(parts: tuple[str, ...]) -> str:
    parts = tuple(part for part in parts if part != "__init__")
    if not parts:
        return "root"
    return "/".join(parts[:2]) if parts[0] == "kernels" else parts[0]


def _in_rooms(source: Source, rooms: tuple[str, ...]) -> bool:
    return source.room.split("/")[0] in rooms


# --- imports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported dotted name; ``module`` is None when the program computes it."""

    node: ast.AST
    module: str | None
    lazy: bool


def imports(source: Source) -> Iterator[Import]:
    """Yield every import of a file: statements anywhere, relative ones resolved, and calls that import by string."""
    folder = (PACKAGE, *source.path.parts[:-1])
    dynamic = set(DYNAMIC_IMPORTS)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "importlib":
            dynamic |= {alias.asname for alias in node.names if alias.name in DYNAMIC_IMPORTS and alias.asname}

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _resolve(folder, node.level, node.module or "")
            yield from (Import(node, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and _last_name(node.func) in dynamic:
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            level = len(name) - len(name.lstrip(".")) if isinstance(name, str) else 0
            yield Import(node, _resolve(folder, level, name.lstrip(".")) if isinstance(name, str) else None, lazy)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or is_function or for_types)

    yield from visit(source.tree, False)


def _resolve(folder: tuple[str, ...], level: int, module: str) -> str:
    if level == 0:
        return module
    if level > len(folder):
        return "<outside of the package>"
    return ".".join((*folder[: len(folder) - level + 1], *filter(None, [module])))


def _last_name(node: ast.AST) -> str:
    return getattr(node, "id", "") or getattr(node, "attr", "")


def _imported_room(module: str) -> str:
    parts = tuple(module.split(".")[1:])
    if parts and parts[0] == "kernels" and len(parts) > 1 and f"kernels/{parts[1]}" not in ROOMS:
        return "kernels"
    room = _room_of(parts)
    return room if room in ROOMS else "root"


def import_table(package: Path) -> list[str]:
    """Arrows point down only: every import is in the table, and lazy where the table says so."""
    found = []
    for source in sources(package):
        if source.room not in ROOMS:
            found.append(source.at(source.tree, f"no such room: {source.room}"))
            continue
        room = ROOMS[source.room]
        for item in imports(source):
            if item.module is None:
                found.append(source.at(item.node, "imports a computed name"))
                continue
            top = item.module.split(".")[0]
            thing = _imported_room(item.module) if top == PACKAGE else top
            allowed = room.inside | {source.room} if top == PACKAGE else room.outside | sys.stdlib_module_names
            if thing not in allowed and not (item.lazy and thing in room.lazily):
                how = " outside a function" if thing in room.lazily else ""
                found.append(source.at(item.node, f"{source.room} imports {thing}{how} ({item.module})"))
    return found


def foreign_reformer(package: Path) -> list[str]:
    """The Reformer of transformers is a test oracle; the product never touches it."""

    def is_foreign(module: str) -> bool:
        return module.startswith(("transformers.models.reformer", "transformers.Reformer"))

    found = []
    for source in sources(package):
        named = [(item.node, item.module or "") for item in imports(source)]
        named += [(node, ast.unparse(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
        found += [source.at(node, f"uses {module}") for node, module in named if is_foreign(module)]
    return found


# --- sizes ------------------------------------------------------------------------------------------------------------


def file_sizes(folder: Path) -> list[str]:
    """A file holds one noun."""
    counted = [(path, len(path.read_text("utf-8").splitlines())) for path in sorted(folder.rglob("*.py"))]
    return [f"{path.relative_to(folder)}: {n} lines, {FILE_LIMIT} at most" for path, n in counted if n > FILE_LIMIT]


def function_sizes(package: Path) -> list[str]:
    """A function fits a screen. The arguments of device code do not count: nothing but arguments reaches it."""
    found = []
    for source in sources(package):
        limit = OPS_FUNCTION_LIMIT if source.room == "ops" else FUNCTION_LIMIT
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                begin = node.body[0].lineno if source.room == "kernels/triton" else node.lineno
                length = (node.end_lineno or node.lineno) - begin + 1
                if length > limit:
                    found.append(source.at(node, f"{node.name} has {length} lines, {limit} at most"))
    return found


# --- behaviour --------------------------------------------------------------------------------------------------------


def printing(package: Path) -> list[str]:
    """A library does not print; the cli does, through rich."""
    return [
        source.at(node, "prints")
        for source in sources(package)
        if source.room != "cli"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTING
    ]


def environment(package: Path) -> list[str]:
    """Decisions follow from arguments, never from the environment."""
    return [
        source.at(node, "reads the environment")
        for source in sources(package)
        if _in_rooms(source, NO_ENVIRONMENT)
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("environ", "getenv") for alias in node.names))
    ]


def synchronisation(package: Path) -> list[str]:
    """Nothing in a layer makes the host wait for the device."""
    found = []
    for source in sources(package):
        if not _in_rooms(source, NO_SYNC):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                one_sided = name == "where" and len(node.args) == 1 and not node.keywords
                if name in SYNCHRONISING or one_sided:
                    found.append(source.at(node, f"waits for the device ({name})"))
            elif isinstance(node, ast.Subscript) and _looks_boolean(node.slice):
                found.append(source.at(node, f"indexes by a mask ({ast.unparse(node)})"))
    return found


def _looks_boolean(index: ast.AST) -> bool:
    if isinstance(index, ast.Tuple):
        return any(map(_looks_boolean, index.elts))
    inverted = isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.Invert)
    return inverted or isinstance(index, ast.Compare) or (isinstance(index, ast.Name) and "mask" in index.id)


def purity(package: Path) -> list[str]:
    """Definitions and kernels: no module, no global randomness, no write to an input."""
    found = []
    for source in sources(package):
        if not _in_rooms(source, PURE):
            continue
        for node in ast.walk(source.tree):
            if (isinstance(node, ast.Attribute) and node.attr == "Module") or (
                isinstance(node, ast.ImportFrom) and any(alias.name == "Module" for alias in node.names)
            ):
                found.append(source.at(node, "knows nn.Module"))
            if isinstance(node, ast.Call) and _is_globally_random(node):
                found.append(source.at(node, f"uses the global generator ({ast.unparse(node.func)})"))
        if not _is_workings(source):
            found += [source.at(node, f"writes to its input {name}") for node, name in _written_inputs(source.tree)]
    return found


def _is_workings(source: Source) -> bool:
    """Whether a file is private to a room of kernels: its functions hand each other buffers to write to."""
    return source.room.startswith("kernels/") and source.path.stem.startswith("_") and source.path.stem != "__init__"


def _is_globally_random(call: ast.Call) -> bool:
    name, owner = _last_name(call.func), ast.unparse(call.func).rpartition(".")[0]
    if name in ("manual_seed", "seed", "set_rng_state") and owner in ("torch", "torch.random", "torch.cuda", "random"):
        return True
    if not isinstance(call.func, ast.Attribute) or any(keyword.arg == "generator" for keyword in call.keywords):
        return False
    return name in RANDOM_IN_PLACE or (name in RANDOM and owner in ("torch", "F", "torch.nn.functional", "random"))


def _written_inputs(tree: ast.AST, outer: dict[str, str] | None = None) -> Iterator[tuple[ast.AST, str]]:
    """Yield writes to parameters of this or an enclosing function, as far as syntax shows them."""
    inputs = outer or {}
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        every = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
        inputs = {**inputs, **{arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in every}}
    for node in ast.iter_child_nodes(tree):
        yield from ((node, name) for name in _written_names(node) if _is_input(node, name, inputs))
        yield from _written_inputs(node, inputs)


def _written_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_") and node.func.attr[0] != "_":
            yield _viewed_name(node.func.value)
        yield from (_viewed_name(keyword.value) for keyword in node.keywords if keyword.arg == "out")
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        if isinstance(target, (ast.Subscript, ast.Attribute)):
            yield _viewed_name(target.value)
        elif isinstance(node, ast.AugAssign) and isinstance(target, ast.Name):
            yield target.id


def _viewed_name(node: ast.AST) -> str:
    """Return the name whose storage an expression such as ``x[0].view(-1)`` shares."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in VIEWS:
            node = node.func.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        else:
            return node.id if isinstance(node, ast.Name) else ""


def _is_input(node: ast.AST, name: str, inputs: dict[str, str]) -> bool:
    if name not in inputs:
        return False
    # `n += 1` rebinds a number and `ctx.x = ...` is autograd's own; on a Tensor both would write to the caller's.
    target = getattr(node, "target", None) or next(iter(getattr(node, "targets", [])), None)
    return isinstance(node, ast.Call) or isinstance(target, ast.Subscript) or "Tensor" in inputs[name]


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernel_twins(package: Path) -> list[str]:
    """Every public function of a kernel file stands in the ops file of the same stem, with the same signature."""
    every = sources(package)
    ops = {source.path.stem: _signatures(source) for source in every if source.room == "ops"}
    found = []
    for source in every:
        if not source.room.startswith("kernels/") or source.path.stem == "__init__" or _is_workings(source):
            continue
        for name, (node, signature) in _signatures(source).items():
            twin = ops.get(source.path.stem, {}).get(name)
            if twin is None:
                found.append(source.at(node, f"{name} has no definition in ops/{source.path.name}"))
            elif twin[1] != signature:
                found.append(source.at(node, f"{name}{signature} differs from its definition {name}{twin[1]}"))
    return found


def _signatures(source: Source) -> dict[str, tuple[ast.AST, str]]:
    """Public functions by name; ``*_kernel`` is device code. Annotations and defaults count, as in ``inspect``."""
    return {
        node.name: (node, f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}")
        for node in source.tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.name.endswith("_kernel")
    }


RULES: tuple[Callable[[Path], list[str]], ...] = (
    import_table,
    foreign_reformer,
    file_sizes,
    function_sizes,
    printing,
    environment,
    synchronisation,
    purity,
    kernel_twins,
)
