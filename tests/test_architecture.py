"""The architecture, read from the source: layers, rooms, cycles, and what no file may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import truthgpt

ROOT = Path(truthgpt.__file__).parent
ROOMS = ("models", "attention", "kv_cache", "memory", "optim", "data", "callbacks", "metrics", "inference", "runtime")
LAYERS: dict[str, int] = {
    **dict.fromkeys(("errors", "version"), 0),
    "version": 0,
    "config": 1,
    **dict.fromkeys(ROOMS, 2),
    **dict.fromkeys(("factories", "trainers", "serving"), 3),
    **dict.fromkeys(
        (
            *("validate_config", "config_rules", "json_schema", "task", "load_model", "export_check", "export_model"),
            *("evaluation_data", "harness_tasks", "serve_model"),
            *("benchmark_train", "inspect_data", "plan_run"),
            *("build", "build_attention", "build_data", "build_images", "build_memory", "build_sources", "build_text"),
            "build_trainer",
        ),
        4,
    ),
    **dict.fromkeys(("cli", "__main__"), 5),
}
"""The layer of every folder and file directly below `truthgpt`."""
UPPER_ROOMS = {"inference", "memory"}
"""Rooms of layer 2 that may use every other room of it."""
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors"}
BROAD_EXCEPT_ALLOWED = {
    *("truthgpt.cli.app", "truthgpt.cli.doctor", "truthgpt.callbacks.base", "truthgpt.serving.engine_thread")
}
IMPORT_MODULE_ALLOWED = {"truthgpt", "truthgpt.cli.components"}
UNPICKLING_ERROR_ALLOWED = {"truthgpt.trainers.checkpoint"}

Sources = dict[str, str]
"""Source text by dotted module name; a package has the name of its folder."""


@dataclass(frozen=True)
class Import:
    """One import statement's target, as written in `module`."""

    module: str
    target: str
    line: int
    in_function: bool
    for_typing: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def read_sources() -> Sources:
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["truthgpt", *path.relative_to(ROOT).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


REAL = read_sources()


def _is_typing_guard(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _walk(node: ast.AST, in_function: bool = False, typing: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        function = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = typing or (isinstance(child, ast.If) and _is_typing_guard(child))
        yield child, function, guarded
        yield from _walk(child, function, guarded)


def imports_of(module: str, source: str, known: set[str]) -> Iterator[Import]:
    """Every import, also those inside functions and for typing; `from package import module` means the module."""
    for node, in_function, for_typing in _walk(ast.parse(source)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import; this test and readers want full names"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name in known else node.module for name in names]
        for target in dict.fromkeys(targets):
            yield Import(module, target, node.lineno, in_function, for_typing)  # type: ignore[attr-defined]


def all_imports(sources: Sources) -> list[Import]:
    return [each for module, source in sources.items() for each in imports_of(module, source, set(sources))]


def room_of(module: str) -> str:
    """First part below `truthgpt`; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def inner_imports(sources: Sources) -> list[Import]:
    """Imports of one module of the project by another; the package's own lazy front door is not one of the rooms."""
    found = [i for i in all_imports(sources) if i.target == "truthgpt" or i.target.startswith("truthgpt.")]
    return [i for i in found if i.module != "truthgpt"]


def wrong_layers(sources: Sources) -> list[str]:
    problems = [
        f"{module} is in no layer" for module in sources if module != "truthgpt" and room_of(module) not in LAYERS
    ]
    for each in inner_imports(sources):
        if each.target == "truthgpt":
            problems.append(f"{each}: import the module itself, not the package")
            continue
        here, there = room_of(each.module), room_of(each.target)
        if here not in LAYERS or there not in LAYERS:
            continue
        if LAYERS[there] > LAYERS[here]:
            problems.append(f"{each}: upwards, from layer {LAYERS[here]} to {LAYERS[there]}")
        elif LAYERS[there] == LAYERS[here] == 3 and here != there:
            problems.append(f"{each}: rooms of layer 3 do not know each other")
        elif LAYERS[there] == LAYERS[here] == 2 and here != there:
            shared = there == "runtime" or each.target.endswith(".base") or here in UPPER_ROOMS
            if not shared:
                problems.append(f"{each}: rooms of layer 2 share only runtime and base modules")
    return problems


def heavy_imports(sources: Sources) -> list[str]:
    """What factories and the roots of a quick start import at module level."""
    return [
        str(each)
        for each in all_imports(sources)
        if room_of(each.module) in ("factories", "config", "cli", "validate_config", "errors", "")
        and not each.in_function
        and not each.for_typing
        and (each.target.split(".")[0] in HEAVY or _is_room_of_layer_2(each))
    ]


def _is_room_of_layer_2(each: Import) -> bool:
    """Factories name their parts without importing them; `runtime` has parts without torch, which the commands use."""
    room = room_of(each.target) if each.target.startswith("truthgpt.") else ""
    return room_of(each.module) == "factories" and LAYERS.get(room) == 2


def import_cycles(sources: Sources) -> list[str]:
    """One line a cycle; imports inside functions count, those for typing only do not run and do not."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for each in inner_imports(sources):
        if not each.for_typing and each.target in graph:
            graph[each.module].add(each.target)
    cycles: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            cycles.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return cycles


def _calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}


def dangerous_code(sources: Sources) -> list[str]:
    """What could run code that a configuration, a checkpoint or a model folder brings along."""
    problems = []
    for module, source in sources.items():
        for name, call in _calls(source):
            where, keywords = f"{module}:{call.lineno}: {name}", _keywords(call)
            last = name.rsplit(".", 1)[-1]
            if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
                problems.append(where)
            if last == "import_module" and module not in IMPORT_MODULE_ALLOWED:
                problems.append(where)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                problems.append(f"{where} without weights_only=True")
            if last == "from_pretrained" and "trust_remote_code" not in keywords:
                problems.append(f"{where} without trust_remote_code")
            if "shell" in keywords:
                problems.append(f"{where} with shell=")
            if last in ("unsafe_load", "full_load") or name in ("yaml.load", "numpy.load", "np.load"):
                problems.append(where)
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            origin = node.module if isinstance(node, ast.ImportFrom) else None
            if {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"} & {*names, origin}:
                if module in UNPICKLING_ERROR_ALLOWED and names == ["UnpicklingError"]:
                    continue
                problems.append(f"{module}: imports {origin or names}")
    return problems


def misplaced_exits(sources: Sources) -> list[str]:
    problems = []
    for module, source in sources.items():
        if room_of(module) == "cli":
            continue
        problems += [
            f"{module}:{c.lineno}: {n}" for n, c in _calls(source) if n in ("sys.exit", "exit", "quit", "SystemExit")
        ]
        problems += [f"{module}: print" for n, _ in _calls(source) if n == "print"]
    return problems


def broad_excepts(sources: Sources) -> list[str]:
    """`except:`, `except Exception` and `except BaseException`; one that always raises again hides nothing."""
    problems = []
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ExceptHandler) or module in BROAD_EXCEPT_ALLOWED:
                continue
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = caught == "" or {"Exception", "BaseException"} & set(caught.strip("()").split(", "))
            if broad and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None):
                problems.append(f"{module}:{node.lineno}: except {caught}")
    return problems


CHECKS: list[Callable[[Sources], list[str]]] = [
    wrong_layers,
    heavy_imports,
    import_cycles,
    dangerous_code,
    misplaced_exits,
    broad_excepts,
]
VIOLATIONS: list[tuple[Callable[[Sources], list[str]], Sources]] = [
    (wrong_layers, {"truthgpt.errors": "def f():\n    from truthgpt.config import load"}),
    (wrong_layers, {"truthgpt.models.a": "if TYPE_CHECKING:\n    from truthgpt.trainers.state import TrainState"}),
    (wrong_layers, {"truthgpt.models.a": "from truthgpt.data.loader import EvalLoader"}),
    (wrong_layers, {"truthgpt.models.a": "from truthgpt import load_config"}),
    (wrong_layers, {"truthgpt.trainers.a": "import truthgpt.factories.optimizer"}),
    (wrong_layers, {"truthgpt.new_room.a": ""}),
    (heavy_imports, {"truthgpt.factories.a": "import numpy as np"}),
    (heavy_imports, {"truthgpt.factories.a": "from truthgpt.optim.lion import Lion"}),
    (heavy_imports, {"truthgpt.cli.a": "from torch import nn"}),
    (
        import_cycles,
        {"truthgpt.cli.a": "import truthgpt.cli.b", "truthgpt.cli.b": "def f():\n    import truthgpt.cli.a"},
    ),
    (dangerous_code, {"truthgpt.a": "eval('1')"}),
    (dangerous_code, {"truthgpt.a": "from pickle import loads"}),
    (dangerous_code, {"truthgpt.trainers.checkpoint": "from pickle import UnpicklingError, loads"}),
    (dangerous_code, {"truthgpt.config.load": "importlib.import_module(name)"}),
    (dangerous_code, {"truthgpt.a": "torch.load(path)"}),
    (dangerous_code, {"truthgpt.a": "torch.load(path, weights_only=False)"}),
    (dangerous_code, {"truthgpt.a": "AutoModel.from_pretrained(name)"}),
    (dangerous_code, {"truthgpt.a": "subprocess.run('ls', shell=True)"}),
    (misplaced_exits, {"truthgpt.build": "sys.exit(2)"}),
    (misplaced_exits, {"truthgpt.build": "raise SystemExit(2)"}),
    (misplaced_exits, {"truthgpt.build": "print('hello')"}),
    (broad_excepts, {"truthgpt.build": "try:\n    f()\nexcept Exception:\n    pass"}),
    (
        broad_excepts,
        {"truthgpt.build": "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    raise OSError from e"},
    ),
    (broad_excepts, {"truthgpt.build": "try:\n    f()\nexcept:\n    pass"}),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source_keeps_the_rule(check: Callable[[Sources], list[str]]) -> None:
    assert check(REAL) == []


@pytest.mark.parametrize(("check", "sources"), VIOLATIONS)
def test_rule_sees_a_violation(check: Callable[[Sources], list[str]], sources: Sources) -> None:
    """A rule that never fails says nothing about the source."""
    fillers = {"truthgpt.trainers.state": "", "truthgpt.data.loader": "", "truthgpt.optim.lion": ""}
    assert len(check({**fillers, **sources})) == 1


def test_rules_read_all_of_the_source() -> None:
    assert {f"truthgpt.{room}" for room in LAYERS} <= set(REAL)
    assert len(inner_imports(REAL)) > 150


COMMANDS = [
    "",
    "main(['--help'])",
    "main(['validate', 'llm_default', '--json'])",
    "main(['components', '--json'])",
    "main(['schema'])",
    "main(['runs', 'list', '.'])",
    "main(['train', '--help'])",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_quick_commands_load_no_torch(command: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom truthgpt.cli.app import main\n"
        f"try:\n    {command or 'pass'}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded:', [name for name in {sorted(HEAVY)} if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "loaded: []"


def test_package_alone_is_empty() -> None:
    script = "import sys, truthgpt; print(sorted(m for m in ('torch', 'pydantic', 'transformers') if m in sys.modules))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert finished.stdout.strip() == "[]", finished.stderr
