"""Structure of the repository: allowed imports, sizes of files and functions, light commands, equal pins."""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from helpers.commands import ROOT
from sa3_build.engines.builders import BUILDERS
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.targets import TARGETS

MAX_LINES, MAX_FUNCTION_LINES = 300, 50
SOURCES = sorted(file for folder in ("build", "scripts", "interface") for file in (ROOT / folder).rglob("*.py"))
RUNTIME = [file for file in SOURCES if file.is_relative_to(ROOT / "scripts")]
CORE = ROOT / "scripts" / "sa3_trt_core"
SEARCHED = [ROOT / "build", ROOT / "scripts", ROOT / "interface"]  # folders on the import path of our modules
COMMANDS = sorted([*(ROOT / "build").glob("*.py"), *(ROOT / "scripts").glob("*.py")])
PIN = re.compile(r"([A-Za-z0-9_.-]+)==([0-9][A-Za-z0-9.+]*)")
ONLY_GPU, ONLY_CPU = {"onnxruntime-gpu", "tensorrt"}, {"onnxruntime", "tensorrt-rtx"}
# From the top: a module imports from rows below its own and from its own package, TYPE_CHECKING imports included. A row
# names packages or modules that do not import one another; what is not named belongs to the package that holds it.
LAYERS = """
commands
sa3_demo
sa3_build
sa3_build.lora
sa3_build.engines
sa3_build.recipes
sa3_build.verification
sa3_build.calibration sa3_build.quantization
sa3_build.export
sa3_build.passes
sa3_build.graph
sa3_build.e4m3 sa3_build.memory
sa3_bench
sa3_validation
sa3_serve sa3_bulk
sa3_trt_core.cli
sa3_trt_core
sa3_trt_core.live_ring
sa3_trt_core.ring_decoding
sa3_trt_core.pipeline sa3_trt_core.ring_requests
sa3_trt_core.stages
sa3_trt_core.batch sa3_trt_core.model_loader
sa3_trt_core.sampling sa3_trt_core.text
sa3_trt_core.request sa3_trt_core.result
sa3_trt_core.audio
sa3_trt_core.adapter_placement
sa3_trt_core.engines
sa3_trt_core.torch_models
sa3_trt_core.lora sa3_trt_core.hub sa3_trt_core.stage_timer
sa3_trt_core.artifacts
sa3_trt_core.paths sa3_trt_core.targets
sa3_trt_core.conditioning sa3_trt_core.console sa3_trt_core.cuda_graph sa3_trt_core.gpu
sa3_trt_core.number_formats sa3_trt_core.streams
sa3_trt_core.shapes
sa3_trt_core.errors sa3_trt_core.version
reprompt
"""
ROW_OF = {name: row for row, line in enumerate(LAYERS.split("\n")) for name in line.split()}


def label(file: Path) -> str:
    return str(file.relative_to(ROOT))


@functools.cache
def imported_names(file: Path) -> tuple[str, ...]:
    """Return every module that a file imports, lazily or not: `from a import b` gives a and a.b."""
    return tuple(_imported(file))


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (word.value for word in node.args if isinstance(word, ast.Constant))


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(file)}


@functools.cache
def file_of(name: str) -> Path | None:
    """Return our file of a module name, or None for a module of another package."""
    for folder in SEARCHED:
        stem = folder.joinpath(*name.split("."))
        for file in (stem.with_suffix(".py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


def reached_from(start: Path) -> set[Path]:
    """Return our files that a file imports, directly or indirectly; a package's __init__ counts with its modules."""
    reached, queue = {start}, [start]
    while queue:
        for name in imported_names(queue.pop()):
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                file = file_of(".".join(parts[:length]))
                if file is not None and file not in reached:
                    reached.add(file)
                    queue.append(file)
    return reached


def module_of(file: Path) -> str:
    """Return the name that a file of ours is imported by."""
    parts = file.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to: the longest that is its name or a package around it."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in ROW_OF), "commands")


def direct_imports(file: Path) -> set[str]:
    """Return our modules that a file imports: of `from a import b` the module a.b if it is one, else a."""
    files = {name: file_of(name) for name in imported_names(file)}
    deepest = {name for name, file_found in files.items() if file_found is not None and not _has_deeper(name, files)}
    return {module_of(file_found) for name in deepest if (file_found := files[name]) is not None} - {module_of(file)}


def _has_deeper(name: str, files: Mapping[str, Path | None]) -> bool:
    """Return True if `from name import x` names only modules: the package's own file is then not used."""
    inner = [
        imported for imported in files if imported.startswith(f"{name}.") and imported.count(".") == name.count(".") + 1
    ]
    return bool(inner) and all(files[imported] is not None for imported in inner)


def upward(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the imports from a layer to one that is not below it."""
    pairs = [(user, used, layer_of(user), layer_of(used)) for user, names in imports.items() for used in names]
    return sorted(
        f"{a} -> {b}"
        for a, b, user_layer, used_layer in pairs
        if user_layer != used_layer and ROW_OF[used_layer] <= ROW_OF[user_layer]
    )


def in_circles(imports: Mapping[str, Iterable[str]]) -> set[str]:
    """Return the modules in import cycles: those left after repeatedly removing modules without imports."""
    left = {user: set(names) for user, names in imports.items()}
    while True:
        done = {user for user, names in left.items() if not names & left.keys()}
        if not done:
            break
        left = {user: names for user, names in left.items() if user not in done}
    while True:  # and those that nothing imports any more
        used = set().union(*left.values()) if left else set()
        kept = {user: names for user, names in left.items() if user in used}
        if len(kept) == len(left):
            return set(left)
        left = kept


def test_the_layers_are_seen_to_be_broken() -> None:
    assert upward({"sa3_trt_core.gpu": ["sa3_trt_core.engines.base"]}) == [
        "sa3_trt_core.gpu -> sa3_trt_core.engines.base"
    ]
    assert upward({"sa3_build.engines.build": ["sa3_demo.music"], "make_calib": ["sa3_demo.music"]}) == [
        "sa3_build.engines.build -> sa3_demo.music"
    ]
    assert upward({"sa3_trt_core.hub.resolve": ["sa3_trt_core.lora.names"]}), "packages of one row are strangers"
    assert not upward({"sa3_trt_core.new": ["sa3_trt_core.pipeline"], "sa3_trt_core.hub.a": ["sa3_trt_core.hub.b"]})
    assert in_circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": [], "e": ["a"]}) == {"b", "c"}


def test_imports_of_types_and_lazy_ones_count(tmp_path: Path) -> None:
    file = ROOT / "scripts" / "sa3_trt_core" / "engines" / "base.py"
    assert "sa3_trt_core.conditioning" in direct_imports(file)  # under TYPE_CHECKING
    assert "sa3_trt_core.pipeline" in direct_imports(CORE / "cli" / "run.py")  # inside a function
    assert direct_imports(CORE / "engines" / "backend.py") >= {"sa3_trt_core.gpu", "sa3_trt_core.errors"}
    assert "sa3_trt_core" not in direct_imports(CORE / "engines" / "backend.py")


def test_no_module_imports_from_a_layer_above_its_own() -> None:
    assert upward({module_of(file): direct_imports(file) for file in SOURCES}) == []


def test_no_modules_import_one_another() -> None:
    assert in_circles({module_of(file): direct_imports(file) for file in SOURCES}) == set()


def test_the_runtime_wheel_holds_what_its_commands_use_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = [ROOT / name for name in wheel["only-include"]]
    packed = {file for file in SOURCES if any(file == folder or file.is_relative_to(folder) for folder in included)}
    outside = {file for file in packed for pattern in wheel["exclude"]
               if fnmatch.fnmatch(label(file), pattern) or label(file).startswith(f"{pattern}/")}  # fmt: skip
    commands = [file_of(entry.partition(":")[0]) for entry in project["project"]["scripts"].values()]
    starts = [*commands, CORE / "__init__.py", *(file for file in packed if file.name == "__main__.py")]
    used = set().union(*(reached_from(file) for file in starts if file is not None))
    assert {label(file) for file in packed - outside - used} == set()
    assert {label(file) for file in used & outside} == set()
    assert used <= packed, "a command needs what the wheel has not"


def test_the_walker_sees_imports_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("import x.y\ndef f():\n    from p import q\n    importlib.import_module('lazy')\n")
    assert set(imported_names(file)) == {"x.y", "p", "p.q", "lazy"}
    assert packages(file) == {"x", "p", "lazy"}
    reached = reached_from(ROOT / "build" / "build_dit_fp8.py")
    assert {label(file) for file in reached} >= {
        "build/sa3_build/quantization/selection.py",
        "scripts/sa3_trt_core/errors.py",
    }
    assert "modelopt" in set().union(*map(packages, reached))


@pytest.mark.parametrize("file", RUNTIME, ids=label)
def test_the_runtime_knows_nothing_of_the_producer(file: Path) -> None:
    producers = {"build", "sa3_build", *(path.stem for path in (ROOT / "build").glob("*.py"))}
    assert packages(file) & producers == set()


@pytest.mark.parametrize("file", sorted(CORE.rglob("*.py")), ids=label)
def test_the_runtime_library_needs_no_producers_package(file: Path) -> None:
    assert packages(file) & {"onnx", "onnx_ir", "modelopt", "diffusers", "transformers"} == set()


def test_compiling_from_onnx_reaches_no_modelopt() -> None:
    reached = reached_from(ROOT / "build" / "build_from_onnx.py")
    assert {label(file) for file in reached} >= {
        "build/sa3_build/engines/tensorrt.py",
        "scripts/sa3_trt_core/hub/resolve.py",
    }
    assert [label(file) for file in reached if "modelopt" in packages(file)] == []


def compared_backends(file: Path) -> list[tuple[int, str]]:
    """Return (line, name) of each comparison with a backend's name: ==, !=, in, not in, or a case of a match."""
    comparisons = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Compare | ast.match_case):
            parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.pattern]
            words = [
                constant.value for part in parts for constant in ast.walk(part) if isinstance(constant, ast.Constant)
            ]
            comparisons += [(parts[0].lineno, word) for word in words if word in BACKENDS]
    return comparisons


def test_the_scan_for_backends_sees_comparisons_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("a == 'torch'\nb not in ('x', 'tensorrt')\nmatch c:\n    case 'onnxruntime': pass\nd = 'torch'\n")
    assert [line for line, _ in compared_backends(file)] == [1, 2, 4]


@pytest.mark.parametrize("file", SOURCES, ids=label)
def test_no_file_but_a_backends_own_compares_with_its_name(file: Path) -> None:
    own = {CORE / "engines" / f"{name}.py": name for name in BACKENDS}
    assert [(line, name) for line, name in compared_backends(file) if name != own.get(file)] == []


def test_every_backend_with_engines_has_a_builder_and_no_other() -> None:
    assert BUILDERS.keys() == {name for name, backend in BACKENDS.items() if backend.suffix}


@pytest.mark.parametrize("file", SOURCES, ids=label)
def test_nothing_edits_the_import_path(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "path"
            and ast.unparse(node.value) == "sys"] == []  # fmt: skip
    assert not {"sys.path", "site", "site.addsitedir"} & set(imported_names(file))


def test_no_module_hides_one_of_the_standard_library() -> None:
    names = {path.stem for folder in ("build", "scripts") for path in (ROOT / folder).glob("*") if path.is_dir()}
    names |= {file.stem for folder in SEARCHED for file in folder.glob("*.py")}
    assert {"sa3_build", "sa3_trt_core", "make_calib", "reprompt"} <= names
    assert names & set(sys.stdlib_module_names) == set()


def test_the_build_folder_is_no_package() -> None:
    assert not (ROOT / "build" / "__init__.py").exists()
    assert not (ROOT / "tests" / "build").exists()


@pytest.mark.parametrize("file", SOURCES, ids=label)
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    assert [(name, length) for name, length in lengths if length > MAX_FUNCTION_LINES] == []


def bare(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without third-party packages: no site-packages, our runtime library by PYTHONPATH only."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SA3_"))}
    env["PYTHONPATH"] = str(ROOT / "scripts")
    argv = [sys.executable, "-S", *command]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=label)
def test_help_needs_no_package(command: Path, tmp_path: Path) -> None:
    result = bare([str(command), "--help"], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["build_from_onnx.py", "build.py"])
def test_the_list_needs_no_package(command: str, tmp_path: Path) -> None:
    result = bare([str(ROOT / "build" / command), "--list"], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    first_words = [line.split()[0] for line in result.stdout.splitlines()[2:]]
    assert first_words == [target.name for target in TARGETS]
    assert list(tmp_path.iterdir()) == []


def pins(name: str) -> dict[str, str]:
    """Return the version by package of a requirements file, in which every line but the last is an exact pin."""
    lines = [line for line in (ROOT / name).read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ."
    matches = {line: PIN.fullmatch(line) for line in lines[:-1]}
    assert [line for line, match in matches.items() if match is None] == []
    version_pairs = [(match[1], match[2]) for match in matches.values() if match]
    assert len(dict(version_pairs)) == len(version_pairs), "a package is pinned twice"
    return dict(version_pairs)


def test_the_two_requirements_files_agree() -> None:
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    assert gpu.keys() - cpu.keys() == ONLY_GPU
    assert cpu.keys() - gpu.keys() == ONLY_CPU
    assert {name: gpu[name] for name in gpu.keys() & cpu.keys()} == {
        name: cpu[name] for name in gpu.keys() & cpu.keys()
    }
    assert gpu["onnxruntime-gpu"] == cpu["onnxruntime"]
    assert {"torch", "onnx", "nvidia-modelopt", "numpy", "huggingface_hub"} <= gpu.keys() & cpu.keys()


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {dist.metadata["Name"].lower().replace("_", "-") for dist in importlib.metadata.distributions()}
    if "onnxruntime-gpu" in installed:
        pytest.skip("the requirements of a GPU host are installed")
    pinned = pins("requirements-cpu.txt")
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in pinned}
    assert versions == pinned
    assert not installed & ONLY_GPU


def test_every_pinned_package_that_the_project_declares_is_there() -> None:
    """pyproject.toml names the runtime library's imports; each has its exact version in both files."""
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert set(declared) <= pins("requirements.txt").keys() & pins("requirements-cpu.txt").keys()
