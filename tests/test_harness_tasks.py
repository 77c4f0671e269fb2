"""Tasks of the lm-evaluation-harness on our models, against log-likelihoods computed by hand; and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.process import Cli, Finished
from tests.sample_data import write_sources
from tests.test_lora_run import LORA, pretrained, write_bases
from truthgpt.errors import ConfigError, DataError
from truthgpt.harness_tasks import run_tasks
from truthgpt.load_model import load_model

CPU = torch.device("cpu")
QUESTIONS = [
    {"question": f"the cat saw {word}", "choices": ["a dog", "the king under a queen", "of"], "label": number % 3}
    for number, word in enumerate(("the", "a", "happy", "slowly", "king", "under", "and"))
]
TASK: dict[str, Any] = {
    "task": "animals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "animals.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def run(cli: Cli, *arguments: str, exit_code: int = 0) -> Finished:
    finished = cli("eval", *arguments)
    assert finished.exit_code == exit_code, finished.stderr
    return finished


def write_task(folder: Path, text: str | None = None, **changes: Any) -> None:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks/animals.yaml").write_text(yaml.safe_dump({**TASK, **changes}) + (text or ""))


@pytest.fixture
def animals(cli: Cli) -> Cli:
    """A folder with a model, `llama`, and the task `animals` in `tasks`."""
    write_sources(cli.folder)
    write_bases(cli.folder)
    write_task(cli.folder)
    (cli.folder / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return cli


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.models.huggingface"])
def test_without_lm_eval(animals: Cli, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    loaded = load_model(animals.folder / "llama", CPU)
    with pytest.raises(
        ConfigError, match=r"--tasks: needs the package lm_eval.*\(pip install 'truthgpt\[eval\]'\)"
    ) as e:
        run_tasks(loaded, ["animals"], animals.folder / "tasks", False, 4)
    assert len(str(e.value).splitlines()) == 1


class TestWithLmEval:
    """Everything else needs the package with all that it imports."""

    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        reason = "lm_eval or one of its own dependencies is not installed: pip install 'truthgpt[eval]'"
        pytest.importorskip("lm_eval.models.huggingface", reason=reason, exc_type=ImportError)

    def by_hand(self, folder: Path) -> tuple[float, float]:
        """Accuracy by the sum of log-probabilities of each choice, and by that sum for each byte of it, in float64."""
        model = load_model(folder, CPU).model.double()
        right = [0, 0]
        for row in QUESTIONS:
            scores = []
            for choice in row["choices"]:  # type: ignore[attr-defined]
                context, answer = str(row["question"]).encode(), f" {choice}".encode()
                ids = torch.tensor([[*context, *answer]])
                with torch.no_grad():
                    log_probabilities = model(input_ids=ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
                score = float(log_probabilities.gather(1, ids[0, len(context) :, None]).sum())
                scores.append((score, score / len(choice)))
            for kind in (0, 1):
                best = max(range(3), key=lambda number, kind=kind: scores[number][kind])  # type: ignore[misc]
                right[kind] += best == row["label"]
        return right[0] / len(QUESTIONS), right[1] / len(QUESTIONS)

    def test_task_against_likelihoods_by_hand(self, animals: Cli) -> None:
        finished = run(animals, "llama", "--tasks", "animals", "--include-path", "tasks", "--json")
        assert set(finished.json) == {"tasks"} and set(finished.json["tasks"]) == {"animals"}
        values = finished.json["tasks"]["animals"]
        assert (values["acc,none"], values["acc_norm,none"]) == self.by_hand(animals.folder / "llama")
        p = values["acc,none"]
        assert values["acc_stderr,none"] == pytest.approx(math.sqrt(p * (1 - p) / (len(QUESTIONS) - 1)))
        table = run(animals, "llama", "--tasks", "animals", "--include-path", "tasks").stdout.splitlines()
        assert table[0].split() == ["task", "metric", "filter", "value"]
        assert ["animals", "acc", "none", f"{p:.4f}"] in [line.split() for line in table]

    def test_run_with_adapters_its_data_and_tasks(self, animals: Cli) -> None:
        trained = animals("train", "base.yaml", *LORA, *pretrained("llama"), "training.learning_rate=1e-1")
        assert trained.exit_code == 0, trained.stderr
        arguments = ("--tasks", "animals", "--include-path", "tasks", "--metrics", "loss", "--json")
        found = run(animals, "runs/t", *arguments).json
        assert set(found) == {"metrics", "tokens", "tasks"}
        values = found["tasks"]["animals"]
        assert (values["acc,none"], values["acc_norm,none"]) == self.by_hand(animals.folder / "runs/t")
        alone = run(animals, "runs/t", "--metrics", "loss", "--json").json
        assert alone == {"metrics": found["metrics"], "tokens": found["tokens"]}

    def test_functions_of_task_files_run_only_when_allowed(self, animals: Cli) -> None:
        (animals.folder / "tasks/mine.py").write_text(
            "from pathlib import Path\nPath('ran').touch()\ndef text(doc):\n    return doc['question']\n"
        )
        write_task(animals.folder, "process_docs: !function mine.unused\ndoc_to_text: !function mine.text\n")
        task = (animals.folder / "tasks/animals.yaml").read_text().replace("process_docs: !function mine.unused\n", "")
        task = task.replace("doc_to_text: '{{question}}'\n", "")
        (animals.folder / "tasks/animals.yaml").write_text(task)
        line = next(n for n, text in enumerate(task.splitlines(), 1) if "!function" in text)
        arguments = ("llama", "--tasks", "animals", "--include-path", "tasks", "--json")
        refused = run(animals, *arguments, exit_code=2).stderr
        assert f"animals.yaml:{line}: !function mine.text (--allow-task-code allows it" in refused
        assert not (animals.folder / "ran").exists()
        allowed = run(animals, *arguments, "--allow-task-code").json
        assert (animals.folder / "ran").exists()
        assert allowed["tasks"]["animals"]["acc,none"] == self.by_hand(animals.folder / "llama")[0]

    @pytest.mark.parametrize(
        ("metric", "said"),
        [
            (
                {"metric": "./mine", "aggregation": "mean", "higher_is_better": True},
                "metric ./mine, which lm_eval would",
            ),
            ({"metric": "acc", "hf_evaluate": True}, "hf_evaluate, a metric to fetch"),
        ],
    )
    def test_metrics_to_fetch_are_refused(self, animals: Cli, metric: dict[str, Any], said: str) -> None:
        write_task(animals.folder, metric_list=[metric])
        refused = run(animals, "llama", "--tasks", "animals", "--include-path", "tasks", exit_code=2).stderr
        assert said in refused

    def test_included_files_are_looked_at(self, animals: Cli) -> None:
        (animals.folder / "elsewhere.yaml").write_text("doc_to_text: !function os.getcwd\n")
        write_task(animals.folder, include="../elsewhere.yaml")
        refused = run(animals, "llama", "--tasks", "animals", "--include-path", "tasks", exit_code=2).stderr
        assert "elsewhere.yaml:1: !function os.getcwd" in refused

    def test_templates_reach_no_code(self, animals: Cli) -> None:
        write_task(animals.folder, doc_to_text="{{ ''.__class__.__mro__[1].__subclasses__() }}")
        refused = run(animals, "llama", "--tasks", "animals", "--include-path", "tasks", exit_code=3).stderr
        assert "SecurityError" in refused

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
            ({"doc_to_text": "{{nothing}}"}, "nothing"),
            ({"output_type": "none"}, "--tasks animals"),
        ],
    )
    def test_tasks_that_cannot_be_run(self, animals: Cli, changes: dict[str, Any], said: str) -> None:
        write_task(animals.folder, **changes)
        loaded = load_model(animals.folder / "llama", CPU)
        with pytest.raises(DataError, match="--tasks animals: ") as refused:
            run_tasks(loaded, ["animals"], animals.folder / "tasks", False, 4)
        assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1

    def test_no_such_task_or_folder(self, animals: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        import lm_eval.tasks

        full = lm_eval.tasks.TaskManager

        def small(include_path: str | None = None, include_defaults: bool = False) -> Any:
            return full(include_path=include_path, include_defaults=False)  # its own index takes 20 s

        monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
        loaded = load_model(animals.folder / "llama", CPU)
        with pytest.raises(ConfigError, match=r"neither .*tasks nor lm_eval has .*'animal'.*did you mean"):
            run_tasks(loaded, ["animal"], animals.folder / "tasks", False, 4)
        with pytest.raises(ConfigError, match=r"--include-path: .*nowhere is no folder"):
            run_tasks(loaded, ["animals"], animals.folder / "nowhere", False, 4)
