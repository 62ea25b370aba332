"""The GPU report: a complete folder whose first line is the verdict, without private data."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import gpu_report
import pytest
from sa3_gpu_report import page
from sa3_gpu_report.host import this_host
from sa3_gpu_report.parts import Part, run_parts
from sa3_gpu_report.scrub import Scrubber

from helpers.commands import ROOT, assert_user_error, run

SECRET = "hf_abcdefgh0123456789"


@pytest.fixture(scope="module")
def report(tiny_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a report on existing graphs."""
    out = tmp_path_factory.mktemp("report") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        result = run(gpu_report.main, ["--tiny", "--onnx-root", tiny_fp8, "--out", out])
    assert result.code == 0, result.err
    assert result.out.startswith("PASSED: ") and str(out / "report.md") in result.out
    return out


def test_the_first_line_is_the_verdict_and_every_part_is_there(report: Path) -> None:
    text = (report / "report.md").read_text()
    document = json.loads((report / "report.json").read_text())
    assert text.splitlines()[0] == f"**{document['verdict']}**" and document["verdict"].startswith("PASSED: ")
    assert document["kind"] == page.KIND and document["tiny"] is True
    status = {part["name"]: part["status"] for part in document["parts"]}
    for name in ("torch, build", "torch, check rows", "torch, gates", "onnxruntime, check rows", "onnxruntime, gates"):
        assert status[name] == "passed", document
    assert all(f"| {name} | {state}" in text for name, state in status.items())
    skipped = [part for part in document["parts"] if part["status"] == "skipped"]
    assert skipped and all(part["why"] for part in skipped)


def test_figures_come_from_what_the_parts_measured(report: Path) -> None:
    parts = {part["name"]: part["figures"] for part in json.loads((report / "report.json").read_text())["parts"]}
    assert parts["torch, check rows"]["engines"] == 4 and 0 < parts["torch, check rows"]["worst_of_the_limit"] <= 1
    assert parts["torch, gates"]["failed"] == 0 and 0.9 < parts["torch, gates"]["worst_denoised_cosine"] < 1


def test_nothing_private_is_in_what_is_sent(report: Path, tiny_fp8: Path) -> None:
    import reprompt

    sent = [path for path in report.rglob("*") if path.is_file() and "work" not in path.relative_to(report).parts]
    assert {path.name for path in sent} >= {"report.md", "report.json", "torch_gates.txt"}
    text = "\n".join(path.read_text() for path in sent)
    for private in (SECRET, str(Path.home()), str(tiny_fp8), str(report), *reprompt.calibration_prompts()):
        assert private not in text or private in ("/", "~"), private


def test_secrets_folders_and_prompts_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-swordfish")
    scrub = Scrubber({"out": tmp_path}, ["slow piano, 70 BPM"])
    text = f'{tmp_path}/a.onnx "slow piano, 70 BPM" swordfish-swordfish hf_1234567890abc /home/alice/x Bearer abc.def'
    scrubbed = scrub(text)
    assert scrubbed == '<out>/a.onnx "<prompt>" <token> <token> ~/x <token>'


def test_a_part_that_fails_or_hangs_does_not_end_the_report(tmp_path: Path) -> None:
    def part(name: str, code: str, limit: float = 20, after: tuple[str, ...] = ()) -> Part:
        return Part(name, (sys.executable, "-c", code), limit, after=after)

    parts = [
        part("wrong", "import sys; print('error: no such thing'); sys.exit(3)"),
        part("needs it", "pass", after=("wrong",)),
        part("hangs", "import time; time.sleep(60)", 0.5),
        part("right", "print('fine')"),
    ]
    result_by_name = {result.part.name: result for result in run_parts(parts, tmp_path, Scrubber({}), 5)}
    assert [result.status for result in result_by_name.values()] == ["failed", "skipped", "failed", "passed"]
    assert (
        "exit code 3: error: no such thing" in result_by_name["wrong"].why
        and "wrong did not pass" in result_by_name["needs it"].why
    )
    assert "not done after" in result_by_name["hangs"].why and (tmp_path / "logs" / "right.txt").read_text() == "fine\n"
    document = page.document(this_host(), list(result_by_name.values()), {})
    assert document["verdict"] == "FAILED: wrong, hangs (1 parts passed, 1 could not be run here)"


def test_what_a_part_leaves_running_and_what_is_no_number_keep_no_report_waiting(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '12'], start_new_session=True); print('done')"
    part = Part("leaves", (sys.executable, "-c", code), 10, figures=lambda: {"worst": float("inf"), "of": [1.0]})
    (result,) = run_parts([part], tmp_path, Scrubber({}), 5)
    assert result.status == "passed" and result.figures == {"worst": None, "of": [1.0]}
    assert (tmp_path / "logs" / "leaves.txt").read_text() == "done\n"


def test_a_part_that_the_whole_limit_ends_is_left_out_and_does_not_fail(tmp_path: Path) -> None:
    part = Part("long", (sys.executable, "-c", "import time; time.sleep(60)"), 50)
    (result,) = run_parts([part], tmp_path, Scrubber({}), 0.02)
    assert (result.status, result.why) == ("skipped", "0.02 minutes are over")


def test_a_report_on_graphs_that_are_not_there_runs_to_its_end(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    result = run(gpu_report.main, ["--tiny", "--onnx-root", root, "--out", tmp_path / "out", "--minutes", 2])
    assert result.code == 3 and "error: FAILED: " in result.err and "Traceback" not in result.err
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    failed = {part["name"]: part["why"] for part in document["parts"] if part["status"] == "failed"}
    assert "onnxruntime, check rows" in failed and "error: " in failed["onnxruntime, check rows"]
    assert (tmp_path / "out" / "report.md").read_text().startswith("**FAILED: ")


def test_mistakes_are_two_lines(tmp_path: Path) -> None:
    assert_user_error(
        run(gpu_report.main, ["--onnx-root", tmp_path / "none", "--out", tmp_path / "out"]), "is not a folder"
    )
    file = tmp_path / "file"
    file.write_text("")
    assert_user_error(run(gpu_report.main, ["--out", file]), "is not a folder")


def test_the_readme_shows_what_the_kept_reports_say() -> None:
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- matrix -->\n(.*?)\n<!-- /matrix -->", text, re.DOTALL)
    assert table is not None and table[1].strip() == page.matrix(page.read_reports(gpu_report.REPORTS)).strip()


def test_a_cell_is_what_a_part_measured_and_empty_where_none_was_run(report: Path) -> None:
    made = json.loads((report / "report.json").read_text())
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]]
            for line in page.matrix([made]).splitlines()[2:]}  # fmt: skip
    assert set(rows) == {"tensorrt", "tensorrt_rtx", "torch", "onnxruntime"}
    header = ["backend", "card", "library, driver", "build", "check rows", "gates", "speed"]
    assert dict(zip(header, rows["tensorrt"], strict=True))["gates"] == "" and rows["tensorrt"][1:] == [""] * 6
    torch = dict(zip(header, rows["torch"], strict=True))
    assert torch["build"] == "yes" and torch["check rows"].startswith("4 engines") and "cosine" in torch["gates"]


def test_a_backend_that_does_not_use_the_card_has_a_row_of_the_cpu(report: Path) -> None:
    made = json.loads((report / "report.json").read_text())
    made["host"] |= {"card": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "on_cpu": ["onnxruntime"]}
    rows = {row.split("|")[1].strip(): row for row in page.matrix([made]).splitlines()[2:]}
    assert "H100" in rows["torch"] and "580.159.04" in rows["torch"]
    assert "CPU (" in rows["onnxruntime"] and "H100" not in rows["onnxruntime"] and ", none" in rows["onnxruntime"]


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    from sa3_trt_core.errors import ToolError

    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ToolError, match="is not a report"):
        page.read_reports(tmp_path)
