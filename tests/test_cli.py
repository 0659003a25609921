"""The command line: help, defaults, and errors that are one clear line."""

import importlib
import inspect
import json
import subprocess
import sys
import time

import pytest
from pipeline_fixtures import save_tiny_checkpoint

from mdkernels import cli, cli_commands
from mdkernels.cli_stages import STAGES

# Arguments of a stage's function that a command line cannot give, and flags the command renames.
NOT_FLAGS = {
    "corpus": {"as_text"},
    "datastore": {"checkpoint_seconds"},
    "train": {"betas"},
    "generate": {"prompts", "stream"},
    "index": {"checkpoint_seconds"},
    "targets": {"checkpoint_seconds"},
}
MAY_BE_NONE = {(stage, "memory") for stage in ("evaluate", "generate", "chat")}
NOT_ARGUMENTS = {"generate": {"prompt", "quiet"}}


def run(*arguments, capsys):
    """(exit status, stdout, stderr) of one command line in this process."""
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_flags_and_defaults_are_those_of_the_function(stage):
    module, name = stage.target.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    flags = {option.name: option for option in stage.options}
    wanted = set(parameters) - NOT_FLAGS.get(stage.name, set())
    assert set(flags) - NOT_ARGUMENTS.get(stage.name, set()) == wanted
    for parameter in parameters.values():
        if parameter.name in flags:
            option = flags[parameter.name]
            empty = parameter.default is inspect.Parameter.empty
            assert option.required == empty or (stage.name, option.name) in MAY_BE_NONE
            if not empty:
                assert option.default == parameter.default, option.name


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_help_shows_defaults_and_an_example_that_parses(stage, capsys):
    status, out, _ = run(stage.name, "--help", capsys=capsys)
    assert status == 0
    assert stage.example in out
    for option in stage.options:
        assert option.flag in out
        if option.default is not None and not isinstance(option.default, bool):
            assert f"(default: {option.default})" in " ".join(out.split())
    import shlex

    words = shlex.split(stage.example)[1:]
    arguments, unknown = cli.build_parser().parse_known_args(words)
    assert not unknown
    missing = [o.flag for o in stage.options if o.required and o.name not in vars(arguments)]
    assert not missing
    assert hasattr(cli_commands, stage.command)


def test_top_level_help_lists_the_stages(capsys):
    for arguments in ((), ("--help",)):
        status, out, _ = run(*arguments, capsys=capsys)
        assert status == 0
        for stage in STAGES:
            assert stage.name in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mdkernels import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*[m for m in ('torch', 'numpy', 'transformers', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_module_entry_point():
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mdkernels", "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("mdkernels: error: unknown stage 'nonsense', there are corpus,")
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown stage 'trian', did you mean 'train'?"),
        (["--version"], "unknown argument '--version'"),
        (["train", "--lrr", "1"], "unknown argument '--lrr', did you mean '--lr'?"),
        (["train", "--out", "x"], "missing --corpus, --model; for example: mdkernels train"),
        (
            ["train", "--corpus", "c", "--model", "m", "--out", "o", "--eval-every", "1"],
            "eval_every: got 1, but there is nothing to evaluate; give valid and base too",
        ),
        (["generate", "--draft-tokens", "x"], "argument --draft-tokens: invalid N|auto value: 'x'"),
        (["train", "--block", "many"], "argument --block: invalid int value: 'many'"),
        (["train", "--objective", "klce"], "argument --objective: invalid choice: 'klce'"),
        (["evaluate", "--base", "b", "--corpus", "nowhere"], "no corpus artefact at nowhere"),
        (
            ["corpus", "--inputs", "x.txt", "--tokenizer", "/no/such/t", "--out", "o"],
            "cannot load a tokenizer from '/no/such/t'",
        ),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments, capsys=capsys)
    assert status == 2
    assert out == ""
    assert err.startswith("mdkernels")
    assert ": error: " in err
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_traceback_on_request(how, capsys, monkeypatch):
    arguments = ["evaluate", "--base", "b", "--corpus", "nowhere"]
    if how == "flag":
        arguments.append("--traceback")
    else:
        monkeypatch.setenv("MDK_DEBUG", "1")
    status, _, err = run(*arguments, capsys=capsys)
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("mdkernels evaluate: error: ")


def test_a_bug_is_not_dressed_as_a_user_error(monkeypatch):
    def broken():
        raise KeyError("internal")

    monkeypatch.setattr(cli_commands, "doctor", broken)
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_commands, "doctor", interrupted)
    assert run("doctor", capsys=capsys) == (130, "", "\nmdkernels doctor: interrupted\n")
    monkeypatch.setattr(cli_commands, "demo", interrupted)
    status, _, err = run("demo", capsys=capsys)
    assert status == 130
    assert err.startswith("\nmdkernels demo: interrupted; the same command continues")


@pytest.mark.parametrize("flush", [True, False])
def test_nobody_reads_the_output(flush):
    """As in `mdkernels generate ... | head`, while it streams and at its end."""
    code = (
        "import sys, time; from mdkernels import cli, cli_commands\n"
        "sys.stdin.read()\n"
        f"cli_commands.doctor = lambda: print('text', flush={flush})\n"
        "raise SystemExit(cli.main(['doctor']))"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_list_may_be_given_in_pieces(monkeypatch, capsys, tmp_path):
    seen = {}
    monkeypatch.setattr(cli_commands, "train", lambda **settings: seen.update(settings))
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"corpus": "c", "model": "m", "out": "o", "track": "aim"}))
    pieces = ["--track", "wandb", "--track", "tensorboard", "mlflow"]
    status, _, err = run("train", "--config", file, *pieces, capsys=capsys)
    assert status == 0, err
    assert seen["track"] == ["wandb", "tensorboard", "mlflow"]


def test_config_file_and_flags(monkeypatch, capsys, tmp_path):
    seen = {}
    monkeypatch.setattr(cli_commands, "train", lambda **settings: seen.update(settings))
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"corpus": "c", "model": "m", "lr": 0.1, "epochs": 2}))
    status, _, err = run(
        "train",
        "--config",
        file,
        "--lr",
        "0.2",
        "--out",
        "o",
        "--no-resume",
        "--compile",
        capsys=capsys,
    )
    assert status == 0, err
    assert seen == {
        "corpus": "c",
        "model": "m",
        "lr": 0.2,
        "epochs": 2,
        "out": "o",
        "resume": False,
        "compile": True,
    }
    file.write_text('{"batchsize": 3}')
    status, _, err = run("train", "--config", file, capsys=capsys)
    assert status == 2
    assert "unknown option 'batchsize', did you mean 'batch_size'?" in err
    yaml = tmp_path / "train.yaml"
    yaml.write_text("corpus: c\nmodel: m\nout: o\nlr: 0.1\nmax_steps: 7\n")
    seen.clear()
    assert run("train", "--config", yaml, "--max-steps", 9, capsys=capsys)[0] == 0
    assert seen == {"corpus": "c", "model": "m", "out": "o", "lr": 0.1, "max_steps": 9}
    yaml.write_text("a: [")
    assert "is no YAML" in run("train", "--config", yaml, capsys=capsys)[2]
    file.write_text("[1]")
    assert "must hold a JSON object" in run("train", "--config", file, capsys=capsys)[2]
    file.write_text("{")
    assert run("train", "--config", file, capsys=capsys)[0] == 2
    assert run("train", "--config", tmp_path / "none.json", capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"overwrite": "no"}, "overwrite must be true or false, got 'no'"),
        ({"resume": 0}, "resume must be true or false, got 0"),
        ({"batch_size": 4.0}, "batch_size must be an integer, got 4.0"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"corpus": 5}, "corpus must be text, got 5"),
        ({"objective": "klce"}, "objective must be one of kl_ce, kl, ce, got 'klce'"),
        ({"track": ["wandb", 1]}, "track must be text, got 1"),
        ({"zzz": 1}, "unknown option 'zzz' (see mdkernels train --help)"),
        ({1: 1}, "unknown option 1 (see mdkernels train --help)"),
    ],
)
def test_values_of_a_config_file_are_checked(monkeypatch, capsys, tmp_path, value, message):
    monkeypatch.setattr(cli_commands, "train", lambda **settings: None)
    file = tmp_path / "train.yaml"
    file.write_text("".join(f"{name}: {json.dumps(item)}\n" for name, item in value.items()))
    status, _, err = run(
        "train", "--config", file, "--model", "m", "--out", "o", "--corpus", "c", capsys=capsys
    )
    assert status == 2
    assert f"config: {message}" in err


def test_a_config_file_may_say_what_flags_can(monkeypatch, capsys, tmp_path):
    seen = {}
    monkeypatch.setattr(cli_commands, "train", lambda **settings: seen.update(settings))
    file = tmp_path / "train.yaml"
    # YAML takes 1e-3 for text, which is how a flag arrives too.
    file.write_text("corpus: c\nmodel: m\nout: o\nlr: 1e-3\ntrack: wandb\nclip: null\nkl_weight:\n")
    assert run("train", "--config", file, capsys=capsys)[0] == 0
    assert (seen["lr"], seen["track"], seen["clip"], seen["kl_weight"]) == (
        1e-3,
        ["wandb"],
        None,
        None,
    )
    for content in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "c.json").write_bytes(content)
        err = run("train", "--config", tmp_path / "c.json", capsys=capsys)[2]
        assert "c.json is no JSON" in err


def test_settings_of_the_wrong_kind_are_named(capsys, tmp_path):
    model = save_tiny_checkpoint(tmp_path / "model", "llama")
    common = ["train", "--corpus", "c", "--model", model, "--out", tmp_path / "o"]
    status, _, err = run(*common, "--max-steps", 1, capsys=capsys)
    assert status == 2
    assert "learns from kNN targets" in err
    status, _, err = run(*common, "--targets", "t", "--epochs", 1, "--kl-weight", 2, capsys=capsys)
    assert status == 2
    assert "kl_weight must be a number >= 0.0 and <= 1.0, got 2.0" in err


def test_doctor_prints_a_report(capsys):
    status, out, _ = run("doctor", capsys=capsys)
    assert status == 0
    assert "torch" in out
