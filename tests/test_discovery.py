"""lm-eval finds our models and tasks by itself, at no cost for other programs, and only once."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TASKS = [
    "alpacafarm_injection",
    "alpacafarm_injection_ignore",
    "alpacafarm_injection_completion",
    "alpacafarm_injection_ignore_completion",
    "alpacafarm_injection_benign",
    "injection_demo",
    "alpacafarm_injection_adaptive",
    "injection_demo_adaptive",
    "injection_records_adaptive",
]
HIGHEST_START_UP_COST_US = 1000


def run(python: Path | str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False, cwd="/")
    if check and result.returncode:
        pytest.fail(f"{arguments}: {result.stdout}\n{result.stderr}")
    return result


def make_environment(folder: Path) -> tuple[Path, Path]:
    """Make a virtual environment to which this one lends its packages, pip too; return its Python and site-packages."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # A path in a .pth file lends the packages and does not run their .pth files, ours among them.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh virtual environment with only our package in it; the rest is lent by this one."""
    python, _ = make_environment(tmp_path_factory.mktemp("venv"))
    how = ["-e", str(ROOT)] if request.param == "editable" else [str(ROOT)]
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *how)
    return python


def test_lm_eval_lists_and_validates_our_tasks(environment: Path, request: pytest.FixtureRequest) -> None:
    assert "All tasks found" in run(environment, "-m", "lm_eval", "validate", "--tasks", ",".join(TASKS)).stdout
    if request.node.callspec.params["environment"] == "wheel":  # each command reads all of lm-eval's tasks anew
        listed = run(environment, "-m", "lm_eval", "ls", "tasks").stdout
        for task in TASKS:
            assert re.search(rf"^\|{task} *\|", listed, re.MULTILINE), task


def test_lm_eval_resolves_our_models_lazily(environment: Path) -> None:
    code = (
        "import sys, lm_eval.models; from lm_eval.api.registry import model_registry as r\n"
        "assert 'dtt_hf' in r and 'dtt_vllm' in r; assert 'torch' not in sys.modules; print(r.get('dtt_hf').__name__)"
    )
    assert run(environment, "-c", code).stdout.strip() == "DttHF"


def test_the_hook_costs_under_a_millisecond_and_imports_nothing(environment: Path) -> None:
    assert "dtt_plugin" not in run(environment, "-X", "importtime", "-c", "pass").stderr
    line = next(Path(p) for p in environment.parent.parent.rglob("dtt_plugin.pth")).read_text()
    code = f"import time; s = time.perf_counter(); exec({line!r}); print((time.perf_counter() - s) * 1e6)"
    assert float(run(environment, "-c", code).stdout) < HIGHEST_START_UP_COST_US


def test_only_one_import_name_is_installed(environment: Path) -> None:
    site = next(environment.parent.parent.rglob("dtt_plugin.pth")).parent
    names = {path.name for path in site.iterdir()}
    assert not names & {"tasks", "model_wrappers", "tests", "benchmarks"}


def test_python_without_lm_eval_starts_as_before(tmp_path: Path) -> None:
    line = (ROOT / "dtt_plugin.pth").read_text()
    code = f"exec({line!r}); import json, sys; print('dtt_plugin' in sys.modules)"
    assert run(sys.executable, "-I", "-c", code).stdout.strip() == "False"


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a package without its files"])
def test_lm_eval_is_imported_where_the_package_is_gone(left: str, tmp_path: Path) -> None:
    """As after an editable checkout was moved: the .pth file is still there."""
    if left != "nothing":
        (tmp_path / "dtt_plugin" / "__pycache__").mkdir(parents=True)
    if left == "a package without its files":
        (tmp_path / "dtt_plugin" / "__init__.py").touch()
    (tmp_path / "lm_eval.py").write_text("found = True")
    line = (ROOT / "dtt_plugin.pth").read_text()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec({line!r})\n"
        "import importlib.util; assert importlib.util.find_spec('lm_eval')\n"
        "import lm_eval; print(lm_eval.found)"
    )
    assert run(sys.executable, "-I", "-S", "-c", code).stdout.strip() == "True"


def test_an_error_within_the_package_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "dtt_plugin").mkdir()
    (tmp_path / "dtt_plugin" / "__init__.py").touch()
    (tmp_path / "lm_eval.py").touch()
    line = (ROOT / "dtt_plugin.pth").read_text()
    for content, words in (("import none_such", "No module named 'none_such'"), ("1 / 0", "ZeroDivisionError")):
        (tmp_path / "dtt_plugin" / "_startup.py").write_text(content)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec({line!r}); import lm_eval"
        done = run(sys.executable, "-I", "-S", "-c", code, check=False)
        assert done.returncode == 1
        assert words in done.stderr


@pytest.mark.parametrize("first", [True, False])
def test_another_hook_that_asks_all_finders_does_not_recurse(first: bool) -> None:
    code = f"""
import sys
class Asking:
    def find_spec(self, name, path=None, target=None):
        if not name.startswith("lm_eval"): return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec") and (spec := finder.find_spec(name, path, target)):
                return spec
class Ancient:  # has no find_spec, which Python allows
    find_module = staticmethod(lambda name, path=None: None)
sys.meta_path.append(Ancient)
import dtt_plugin._startup
sys.meta_path.insert(0 if {first} else len(sys.meta_path), Asking())
import lm_eval.models
from lm_eval.api.registry import model_registry
print("dtt_hf" in model_registry)
"""
    assert run(sys.executable, "-c", code).stdout.strip() == "True"


def test_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    python, site = make_environment(tmp_path / "venv")
    before = {path for path in (tmp_path / "venv").rglob("*") if "__pycache__" not in path.parts}
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", str(ROOT))
    assert (site / "dtt_plugin" / "tasks" / "injection_demo" / "records.json").is_file()
    run(python, "-m", "pip", "uninstall", "-q", "-y", "dtt-plugin")
    after = {path for path in (tmp_path / "venv").rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_a_discovering_lm_eval_registers_nothing_twice() -> None:
    """What lm-eval's development branch does, faked: entry points become registry entries, before or after ours."""
    code = """
import logging, sys, io
from importlib.metadata import entry_points
log = io.StringIO(); logging.basicConfig(stream=log, level=logging.WARNING)
import lm_eval.api.registry as registry
eps = [ep for ep in entry_points(group="lm_eval.models") if ep.name.startswith("dtt_")]
assert len(eps) == 2, eps
if sys.argv[1] == "before":
    for ep in eps: registry.model_registry.register(ep.name, target=ep)
import lm_eval.models
if sys.argv[1] == "after":
    for ep in eps: registry.model_registry.register(ep.name, target=ep)
names = [n for n in registry.model_registry if n.startswith("dtt_")]
assert sorted(names) == ["dtt_hf", "dtt_vllm"], names
if sys.argv[1] == "after":  # the order matters for models alone, and lm-eval's tasks take long to read
    from lm_eval.tasks import TaskManager
    import dtt_plugin.tasks, pathlib
    ours = pathlib.Path(dtt_plugin.tasks.__file__).parent
    manager = TaskManager(include_path=str(ours))  # as if lm-eval had discovered the folder itself
    assert manager.all_tasks.count("injection_demo") == 1
assert "overrides existing" not in log.getvalue() and "Duplicate" not in log.getvalue(), log.getvalue()
print("once")
"""
    for order in ("before", "after"):
        assert run(sys.executable, "-c", code, order).stdout.strip().endswith("once")


def test_the_users_own_task_folder_wins_over_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: injection_demo\noutput_type: generate_until\n")
    code = (
        f"from lm_eval.tasks import TaskManager; m = TaskManager(include_path={str(tmp_path)!r}); "
        "print(m.task_index['injection_demo'].yaml_path)"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == str(tmp_path / "mine.yaml")


def test_importing_the_package_and_dtt_help_import_no_torch() -> None:
    code = (
        "import sys, dtt_plugin.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'lm_eval', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code).stdout.strip().endswith("[]")


def test_bad_input_ends_lm_eval_with_a_sentence_and_exit_code_2() -> None:
    result = run(
        sys.executable, "-m", "lm_eval", "--model", "dtt_hf", "--model_args", "pretrained=x,defence=sandwich",
        "--tasks", "injection_demo", check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "--model dtt_hf has no argument 'defence'; did you mean 'defense'?" in result.stderr
    assert "Traceback" not in result.stderr
