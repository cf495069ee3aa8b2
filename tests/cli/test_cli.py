"""The command line: output, one-line errors and exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from networks import random_checkpoint
from PIL import Image

from resnet56 import __version__, cli
from resnet56.data.class_names import CIFAR10
from resnet56.runs.directory import RunDirectory

# The fixture `run` and a test in another process draw charts.
pytestmark = pytest.mark.usefixtures("blank_charts")
QUICKLY = ["--arch", "resnet8", "--batch-size", "8", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an image directory of red and blue images of several sizes."""
    root = tmp_path_factory.mktemp("data") / "colors"
    chance = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = chance.integers(0, 80, (20 + index, 40, 3), np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "colors"
    assert cli.main(["train", "quick", "--data", str(data_dir), "--out", str(out), *QUICKLY]) == 0
    return out


Refused = Callable[..., str]


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Return a function that runs a command in an empty directory and returns its error line."""
    monkeypatch.chdir(tmp_path)

    def run_and_fail(*arguments: str, code: int) -> str:
        assert cli.main(list(arguments)) == code
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1, shown.err
        assert shown.err.startswith("resnet56: ")
        assert not list(tmp_path.iterdir()), "something was left on the disk"
        return shown.err

    return run_and_fail


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from resnet56.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'PIL', 'tyro') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.endswith("[]\n")
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", shown.stdout, re.MULTILINE)
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["train", "quick"], ["evaluate"], ["describe"], ["data"], ["data", "fetch"]],
)
def test_every_command_has_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--help"]) == 0
    shown = capsys.readouterr()
    assert f"usage: resnet56 {arguments[0]}" in shown.out
    assert shown.err == ""


def test_help_shows_the_given_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "report", "--help"])
    shown = " ".join(re.split(r"[\s│]+", capsys.readouterr().out))
    assert "The defaults are those of report." in shown
    assert "(default: resnet56-bottleneck)" in shown


def test_the_module_can_be_run_as_a_command() -> None:
    command = [sys.executable, "-m", "resnet56", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.stdout == f"resnet56 {__version__}\n"


def test_describe_prints_the_table_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe", "resnet56-bottleneck"]) == 0
    text = capsys.readouterr().out
    assert "591,322" in text
    assert re.search(r"stage3 +38-55 +6 +256x8x8", text)
    assert cli.main(["describe", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["parameters"] == 853_018
    assert [part["layers"] for part in config["parts"]] == ["1", "2-19", "20-37", "38-55", "56"]


def test_evaluate_reproduces_the_metrics_of_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = json.loads((run / "evaluation.json").read_text())
    assert cli.main(["evaluate", str(run), "--json", "--device", "cpu", "--robustness", "4"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["test"] == trained["test"]
    assert evaluated["robustness"]["images"] == 4
    assert json.loads((run / "evaluation.json").read_text()) == evaluated
    assert cli.main(["evaluate", str(run), "--robustness", "0", "--split", "train"]) == 0
    text = capsys.readouterr().out
    assert f"accuracy {100 * trained['train']['accuracy']:.2f} %" in text
    assert re.search(r"^ *red .* 10 *$", text, re.MULTILINE)


@pytest.mark.usefixtures("quick_evaluation")
def test_validation_metrics_come_before_test_metrics(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    command = ["train", "quick", "--data", str(data_dir), "--out", str(kept), "--val-size", "5"]
    assert cli.main([*command, *QUICKLY]) == 0
    text = capsys.readouterr().out
    held = json.loads((kept / "evaluation.json").read_text())["validation"]
    line = f"validation accuracy {100 * held['accuracy']:.2f} %, loss {held['loss']:.4f}, 5 images"
    assert -1 < text.find(line) < text.find("test accuracy")
    assert cli.main(["evaluate", str(kept), "--robustness", "0", "--split", "validation"]) == 0
    assert f"accuracy {100 * held['accuracy']:.2f} %" in capsys.readouterr().out
    before = (run / "evaluation.json").read_bytes()
    assert cli.main(["evaluate", str(run), "--split", "validation"]) == 2
    assert "has no validation images" in capsys.readouterr().err
    assert (run / "evaluation.json").read_bytes() == before
    assert cli.main(["evaluate", "resnet56", "--data", "digits", "--split", "validation"]) == 2


@pytest.mark.usefixtures("quick_evaluation")
def test_evaluating_other_images_writes_no_files(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "evaluation.json").read_bytes()
    shutil.copytree(data_dir, tmp_path / "fewer")
    (tmp_path / "fewer" / "test" / "red" / "0.png").unlink()
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path / "fewer"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["n"] == 7
    np.save(tmp_path / "x_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
    np.save(tmp_path / "x_labels.npy", np.array([0, 1, 0]))
    assert cli.main(["evaluate", str(run), "--data", str(tmp_path)]) == 0
    assert re.search(r"^ *x .* 3 *$", capsys.readouterr().out, re.MULTILINE)
    assert (run / "evaluation.json").read_bytes() == before


def test_each_parity_comparison_is_stored_once(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert cli.main(["evaluate", str(run), "--parity", "fp32,bf16", "--device", "cpu"]) == 0
    kept = json.loads((run / "parity.json").read_text())["comparisons"]
    assert [(entry["a"], entry["b"]) for entry in kept] == [("cpu fp32", "cpu bf16")]
    assert kept[0]["verdict"] in capsys.readouterr().out
    shutil.copytree(data_dir, tmp_path / "fewer")
    (tmp_path / "fewer" / "test" / "red" / "0.png").unlink()
    other = ["evaluate", str(run), "--parity", "fp32,bf16", "--data", str(tmp_path / "fewer")]
    assert cli.main(other) == 0
    assert json.loads((run / "parity.json").read_text())["comparisons"] == kept
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--parity", "cpu"]) == 2
    assert "requires a pair" in capsys.readouterr().err


def test_training_accepts_the_recipe_file_of_a_run(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(run / "recipe.json")
    assert (
        cli.main(["train", recipe, "--data", str(data_dir), "--out", str(tmp_path / "again")]) == 0
    )
    mine, theirs = (
        json.loads((path / "evaluation.json").read_text())["train"]["loss"]
        for path in (run, tmp_path / "again")
    )
    assert mine == theirs


def test_training_without_evaluation_prints_how_to_evaluate(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run 1"
    arguments = ["quick", "--data", str(data_dir), "--out", str(out), "--no-evaluate", *QUICKLY]
    assert cli.main(["train", *arguments]) == 0
    assert f"to evaluate the run: resnet56 evaluate '{out}'\n" in capsys.readouterr().out
    assert not (out / "evaluation.json").exists()


def test_runs_are_numbered_without_out(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/quick-colors").mkdir(parents=True)
    Path("runs/quick-colors/file").touch()
    assert cli.main(["train", "quick", "--data", str(data_dir), "--quiet", *QUICKLY]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "quick-colors",
        "quick-colors-2",
    ]


def test_ctrl_c_exits_with_130_and_prints_the_command_to_resume(
    data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a run"
    command = [sys.executable, "-m", "resnet56", "train"]
    flags = ["--data", str(data_dir), "--out", str(out), *QUICKLY, "--epochs", "100000"]
    options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
    training = subprocess.Popen(
        [*command, "quick", *flags], stderr=subprocess.PIPE, text=True, **options
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    training.send_signal(signal.CTRL_BREAK_EVENT if os.name == "nt" else signal.SIGINT)
    _, shown = training.communicate(timeout=120)
    # The exit code is 128 plus the number of the signal.
    assert training.returncode == (149 if os.name == "nt" else 130)
    assert f"continue with: resnet56 train --resume --out '{out}'" in shown
    head = json.loads((out / "checkpoint" / "checkpoint.json").read_text())
    assert head["progress"]["step"] > 0


def test_resume_requires_only_the_run_directory(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--resume", "--out", str(run)]) == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "unknown command 'nonsense'.*train"),
        (["train"], "no recipe given.*report"),
        (["train", "nonsense"], "unknown recipe 'nonsense'.*report, he2015, fast, best, quick"),
        (["train", "none.json"], r"cannot read the recipe none\.json"),
        (["train", "quick", "--batch-size", "0"], "batch_size must be from 1 to 1,000,000, not 0"),
        (["train", "quick", "--lr", "-1"], "lr must be above 0 .*, not -1"),
        (["train", "quick", "--epochs", "abc"], "--epochs.*'abc'.*--help"),
        (["train", "quick", "--nonsense"], "--nonsense.*--help"),
        (["train", "quick", "--arch", "vgg16"], "unknown architecture 'vgg16'"),
        (["train", "quick", "--arch", "resnet57"], "nearest are 56 and 62"),
        (["train", "quick", "--arch", "plain57"], "nearest are 56 and 62"),
        (["describe", "plain56-bottleneck"], "choose plain56"),
        (["train", "quick", "--device", "abacus"], "unknown device 'abacus'"),
        (["train", "quick", "--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["train", "quick", "--data", "cifar11"], "unknown data set 'cifar11'.*cifar10"),
        (["train", "--resume"], "--resume requires --out"),
        (["describe", "resnet1"], "nearest is 8"),
        (["describe", "--classes", "1"], "2 to 1,000,000 classes"),
        (["data", "nonsense"], "unknown command: resnet56 data nonsense.*fetch"),
        (["evaluate"], "(?i)run.*--help"),
    ],
)
def test_a_usage_error_has_one_line_and_exit_code_2(
    refused: Refused, arguments: list[str], says: str
) -> None:
    assert re.search(says, refused(*arguments, code=2))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "quick", "--data", "./none"], "none"),
        (["train", "quick", "--resume", "--out", "none"], "no run found at none"),
        (["evaluate", "none"], "none is neither a run nor a pretrained model"),
    ],
)
def test_a_missing_path_causes_one_line_and_exit_code_1(
    refused: Refused, arguments: list[str], says: str
) -> None:
    assert re.search(says, refused(*arguments, code=1))


def test_a_path_that_is_too_long_causes_a_one_line_error(refused: Refused) -> None:
    assert "name too long" in refused("train", "quick", "--out", "x" * 300, code=1).lower()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\nmore"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_causes_a_one_line_error(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def greedy(_: list[str]) -> int:
        raise error

    for command in ("describe", "train"):
        monkeypatch.setattr(f"resnet56.cli.{command}.run", greedy)
    assert refused("describe", code=1).strip() == "resnet56: out of memory"
    assert "out of memory; choose a smaller --batch-size" in refused("train", code=1)


@pytest.mark.skipif(os.name == "nt", reason="closing pipes works differently on Windows")
@pytest.mark.parametrize("command", [["--help"], ["data", "fetch", "--help"]])
def test_a_closed_output_pipe_causes_no_traceback(command: list[str]) -> None:
    """For example, `resnet56 --help | head -0`. The exit code is that of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "resnet56", *command], stdout=gone, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")


NO_HOME = """
import json, pwd, sys
def nobody(*_): raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = nobody
from resnet56.cli import main
for words in json.loads(sys.argv[1]):
    print("exit code", main(words), flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no password database")
def test_commands_work_without_a_home_directory(run: Path, data_dir: Path, tmp_path: Path) -> None:
    """For example, `docker run --user 54321` sets no HOME, and its user has no passwd entry."""
    image = next((data_dir / "test" / "red").iterdir())
    commands = [
        ["data", "fetch", "cifar10"],
        ["describe"],
        ["predict", str(image), "--run", str(run), "--device", "cpu"],
        ["train", "quick", "--data", str(data_dir), "--out", str(tmp_path / "run"), *QUICKLY],
    ]
    hidden = ("HOME", "XDG_", "MPLCONFIGDIR", "RESNET56_DATA", "USER", "LOGNAME")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME, json.dumps(commands)],
        env=kept | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert re.findall(r"exit code (\d+)", done.stdout) == ["1", "0", "0", "0"], done.stderr
    assert re.fullmatch(r"resnet56: .*set HOME, or set RESNET56_DATA.*\n", done.stderr)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_missing_temporary_directory_causes_a_one_line_error(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: list[str]) -> int:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("resnet56.cli.describe.run", run)
    assert "set TMPDIR" in refused("describe", code=1)


def test_an_existing_file_as_output_is_rejected_before_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine"
    file.write_text("precious")
    assert cli.main(["train", "quick", "--data", "./none", "--out", str(file)]) == 1
    assert "as a run directory" in capsys.readouterr().err
    assert file.read_text() == "precious"


@pytest.mark.usefixtures("quick_evaluation")
def test_classes_are_matched_by_name(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images of other classes are skipped. A data set without common classes causes an error."""
    for split in ("train", "test"):
        for name in ("green", "red"):
            target = tmp_path / "other" / split / name
            target.mkdir(parents=True)
            for image in (data_dir / split / "red").iterdir():
                (target / image.name).write_bytes(image.read_bytes())
    other = tmp_path / "other"
    assert cli.main(["evaluate", str(run), "--data", str(other), "--json"]) == 0
    shown = capsys.readouterr()
    assert "skipped the images of green" in shown.err
    metrics = json.loads(shown.out)["test"]
    assert (metrics["n"], metrics["per_class"]["red"]["support"]) == (4, 4)
    shutil.rmtree(other / "train")
    assert cli.main(["evaluate", str(run), "--data", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["n"] == 4
    shutil.rmtree(other / "test" / "red")
    assert cli.main(["evaluate", str(run), "--data", str(other)]) == 2
    assert "no classes in common (data: green;" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_evaluation")
def test_a_run_without_a_predefined_split_is_evaluated_on_its_own_test_images(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training images are excluded, even after the directory is moved."""
    plain = Path(shutil.copytree(data_dir / "train", tmp_path / "plain"))
    out = tmp_path / "run"
    assert cli.main(["train", "quick", "--data", str(plain), "--out", str(out), *QUICKLY]) == 0
    moved = plain.rename(tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--data", str(moved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["n"] == 4


@pytest.mark.parametrize("command", [["train", "quick"], ["evaluate", "resnet56"], ["bench"]])
@pytest.mark.parametrize("data", ["", " "])
def test_an_empty_data_argument_raises_an_error(
    refused: Refused, command: list[str], data: str
) -> None:
    assert "--data is empty; use digits, cifar10, cifar100" in refused(
        *command, "--data", data, code=2
    )


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_directory_takes_precedence_over_a_data_set_of_the_same_name(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    from resnet56.cli.common import load_data

    shutil.copytree(data_dir, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert load_data(name).classes == ("blue", "red")
    assert f"loaded the directory {tmp_path / name} instead of" in capsys.readouterr().err
    assert load_data(None).classes == tuple("0123456789")  # the digits are the default
    assert load_data(None, own="digits").classes == tuple(
        "0123456789"
    )  # the data set that a run was trained on
    (tmp_path / name).rename(tmp_path / "other")
    if name == "digits":
        assert load_data(name).classes == tuple("0123456789")


@pytest.mark.parametrize("form", ["~/{}", "~/./{}"])
def test_an_unexpanded_tilde_is_the_home_directory(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    monkeypatch.setenv("HOME", str(data_dir.parent))
    monkeypatch.setenv("USERPROFILE", str(data_dir.parent))
    path = form.format(data_dir.name)
    wanted = "no classes in common (data: blue, red;"
    for arguments in ([f"--data={path}"], ["--data", path]):
        assert cli.main(["evaluate", "resnet56", *arguments]) == 2
        assert wanted in capsys.readouterr().err
    assert cli.main(["predict", path]) == 0
    assert cli.main(["predict", f"--run={path}/none", "x"]) == 1
    assert str(data_dir.parent) in capsys.readouterr().err
    assert cli.main(["predict", "a~b", "~nobody-of-this-name"]) == 1  # not expanded


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_control_characters_in_names_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of every type contain escape sequences, and line feeds that would forge lines."""
    evil = "\x1b[2J\nresnet56: all is well\x9b"
    monkeypatch.chdir(tmp_path)
    root = tmp_path / evil
    cat = root / "test" / "cat"
    cat.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(cat / f"{evil}.png")
    (cat / f"x.{evil}").write_bytes(b"\x89PNG\r\n\x1a\n")
    (cat / f"{evil}.jpg").write_bytes(b"junk")
    RunDirectory(tmp_path / "run").save(random_checkpoint(classes=CIFAR10))
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / f"{evil}.npy", np.zeros((2, 32, 32, 3), np.uint8))
    np.save(arrays / "labels.npy", np.zeros(2, np.uint8))
    for arguments in (
        ["evaluate", "run", "--data", evil],
        ["evaluate", "run", "--data", evil, "--skip-broken"],
        ["evaluate", "run", "--data", "arrays"],
        ["evaluate", evil],
        ["predict", evil],
        ["predict", "--run", evil, "x.png"],
        ["train", "quick", "--data", evil],
        ["train", evil],
        ["train", "--resume", "--out", evil],
        ["data", "fetch", "--mirror", f"http://{evil}/"],
        ["describe", evil],
        [evil],
    ):
        cli.main(arguments)
        shown = capsys.readouterr()
        for line in (*shown.out.split("\n"), *shown.err.split("\n")):
            assert line.isprintable(), arguments
            assert not line.startswith("resnet56: all"), arguments


def test_an_offline_error_lists_alternatives(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that refuses connections simulates a machine without a network."""
    monkeypatch.setenv("RESNET56_DATA", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert cli.main(["train", "quick", "--data", "cifar10", "--out", str(tmp_path / "r")]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    for way in ("--data digits", "--data DIR", "--mirror"):
        assert way in shown
