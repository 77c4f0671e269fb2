"""Tasks of the lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness). Layer 4.

The package lm_eval is an extra, and imported where it is used. A task file can bring code in three ways: functions that
it names, templates, and metrics that it has fetched. The first and the last are refused unless the user allows them;
templates are rendered in a sandbox.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from truthgpt.errors import ConfigError, DataError, Problem
from truthgpt.load_model import LoadedModel

logger = logging.getLogger(__name__)

TaskResults = dict[str, dict[str, float | None]]
"""By task, its values by lm_eval's `metric,filter`; None where it has no number."""
_SEED = 1234
"""lm_eval's own, for the choice of examples that stand before a question."""
_TASK_ERRORS = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError)
"""What lm_eval raises over a task file that it cannot make sense of."""


@dataclass(frozen=True)
class _Code:
    """What a task file names that would run code; `line` counts from 1."""

    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def require_lm_eval() -> None:
    """Raise ConfigError when lm_eval cannot be imported."""
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        message = f"needs the package lm_eval, which cannot be imported: {error}"
        raise ConfigError([Problem("--tasks", message, suggestion="pip install 'truthgpt[eval]'")]) from error


def run_tasks(
    loaded: LoadedModel, names: Sequence[str], include_path: Path | None, allow_code: bool, batch_size: int
) -> TaskResults:
    """Evaluate a language model on tasks, by lm_eval and its own wrapper around our model and tokenizer.

    Args:
        names: tasks, groups or tags: of `include_path` where that holds them all, else lm_eval's own too.
        include_path: folder of task files (YAML); paths of data in them are relative to the working directory.
        allow_code: let task files of `include_path` name functions and metrics to fetch.

    Raises:
        ConfigError: lm_eval is missing, no such task, or a task file that names code which is not allowed.
        DataError: a task cannot be read or run, its data missing for example.
    """
    require_lm_eval()
    import jinja2
    from datasets.exceptions import DatasetsError
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if include_path is not None and not allow_code:
        _refuse_code(include_path)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(names, include_path)
    # What it prints is for people, and stdout may be a JSON document.
    with contextlib.redirect_stdout(sys.stderr), _sandboxed_templates(allow_code):
        try:
            tasks = manager.load(list(names))
            for task in tasks["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=_SEED)
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size)
            found = evaluate(lm=model, task_dict=tasks, log_samples=False)
        except (*_TASK_ERRORS, DatasetsError, jinja2.TemplateError) as error:
            said = " ".join(str(error).split())
            raise DataError(f"--tasks {','.join(names)}: {type(error).__name__}: {said}") from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def _task_manager(names: Sequence[str], include_path: Path | None) -> Any:
    """lm_eval's index of tasks; that of its own takes 20 s to make, and is made only for a task that is not elsewhere.

    Raises:
        ConfigError: a task that is nowhere.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    logger.info("reading the index of lm_eval's own tasks")
    include = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=include)
    known = manager.all_tasks
    problems = []
    for name in sorted(set(names) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        where = "lm_eval has" if include_path is None else f"neither {include_path} nor lm_eval has"
        hint = f"did you mean {near[0]}?" if near else "--include-path names a folder of task files"
        problems.append(Problem("--tasks", f"{where} no task {name!r}", suggestion=hint))
    if problems:
        raise ConfigError(problems)
    return manager


# --- what task files bring along -------------------------------------------------------------------------------------


def _refuse_code(folder: Path) -> None:
    """Raise ConfigError when a task file in `folder`, or one that it includes, names code."""
    if not folder.is_dir():
        raise ConfigError([Problem("--include-path", f"{folder} is no folder", suggestion="name one of task files")])
    found: list[_Code] = []
    seen: set[Path] = set()
    waiting = sorted(folder.rglob("*.yaml"))
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"--include-path: {path} is no YAML: {' '.join(str(error).split())}") from error
        found += _code(path, root)
        waiting += [path.parent / name for name in _texts(_value(root, "include"))]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        hint = "--allow-task-code allows it, which runs that code"
        raise ConfigError([Problem("--include-path", f"task files name code: {found[0]}{more}", suggestion=hint)])


def _code(path: Path, root: yaml.Node | None) -> Iterator[_Code]:
    """Functions, and metrics that lm_eval has not itself and would fetch."""
    from lm_eval.api.metrics import mean  # noqa: F401  # registers the metrics
    from lm_eval.api.registry import METRIC_REGISTRY

    for node in _nodes(root):
        line = node.start_mark.line + 1
        if not node.tag.startswith("tag:yaml.org,2002:"):
            yield _Code(path, line, f"{node.tag} {node.value if isinstance(node, yaml.ScalarNode) else ''}".rstrip())
        for name in _texts(_value(node, "metric")):
            if name not in METRIC_REGISTRY:
                yield _Code(path, line, f"metric {name}, which lm_eval would fetch")
        if _texts(_value(node, "hf_evaluate")):
            yield _Code(path, line, "hf_evaluate, a metric to fetch")


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node of a document once, whatever its aliases."""
    waiting: list[yaml.Node] = [] if root is None else [root]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _texts(node: yaml.Node | None) -> list[str]:
    """A scalar, or the scalars of a list."""
    if isinstance(node, yaml.SequenceNode):
        return [item.value for item in node.value if isinstance(item, yaml.ScalarNode)]
    return [node.value] if isinstance(node, yaml.ScalarNode) else []


@contextlib.contextmanager
def _sandboxed_templates(allow_code: bool) -> Iterator[None]:
    """lm_eval renders the templates of task files as full jinja, in which a template can reach any code."""
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    own = lm_eval.utils.env
    if not allow_code:
        sandbox = ImmutableSandboxedEnvironment(
            loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
        )
        sandbox.filters.update(own.filters)
        lm_eval.utils.env = sandbox
    try:
        yield
    finally:
        lm_eval.utils.env = own


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    """The metrics among what lm_eval says of a task; standard errors that it did not make are left out."""
    return {
        key: float(value) if math.isfinite(value) else None
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
