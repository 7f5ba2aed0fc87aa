"""The files for ``accelerate launch --config_file`` are read by Accelerate as they are meant, to the last key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, launch, patch_environment

import stkit

FOLDER = Path(stkit.__file__).parent / "train" / "accelerate"
FILES = {
    "one_gpu": ("NO", 1),
    "two_processes_cpu": ("MULTI_GPU", 2),
    "fsdp": ("FSDP", 2),
    "deepspeed": ("DEEPSPEED", 2),
}


def arguments(name: str):
    """What the launcher makes of a file."""
    asked = ["--config_file", str(FOLDER / f"{name}.yaml"), "--num_cpu_threads_per_process", "1", "-m", "stkit", "sft"]
    return _validate_launch_command(launch_command_parser().parse_args(asked))[0]


def test_these_files_are_there_and_no_others():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_accelerates_own_config_class_takes_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes) == FILES[name]
    assert config.mixed_precision == "no" and config.num_machines == 1  # precision is train.precision's


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_no_key_of_a_section_is_one_that_the_launcher_does_not_know(name):
    """A misspelled key is set and never read: Accelerate says nothing."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    section = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())[f"{name}_config"]
    assert section and set(section) <= set(known)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"two_processes_cpu"}))
def test_a_file_for_gpus_says_first_that_it_was_not_run_on_one(name):
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# not run on a GPU here\n")


def test_fsdp_reads_as_version_two_with_the_layers_of_the_model_and_whole_weights_in_every_process():
    environment = launch.prepare_multi_gpu_env(arguments("fsdp"))
    chosen = {key: value for key, value in environment.items() if key.startswith("FSDP_")}
    with patch_environment(**chosen):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
    assert plugin.activation_checkpointing is False and environment["ACCELERATE_MIXED_PRECISION"] == "no"
    model = stkit.load_model("tiny-untrained", device="cpu").model
    plugin.set_auto_wrap_policy(model)
    wrapped = {cls.__name__ for cls in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == {"Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"}


def test_deepspeed_reads_as_zero_two_that_loads_weights_whole():
    args = arguments("deepspeed")
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = launch.prepare_deepspeed_cmd_env(args)
    wanted = {"ZERO_STAGE": "2", "ZERO3_INIT": "false", "OFFLOAD_OPTIMIZER_DEVICE": "none"}
    assert {key: environment[f"ACCELERATE_DEEPSPEED_{key}"] for key in wanted} == wanted
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "1" and args.nproc_per_node == "2"


def test_one_gpu_is_one_process_on_the_first():
    command, environment = launch.prepare_simple_launcher_cmd_env(arguments("one_gpu"))
    assert command[1:] == ["-m", "stkit", "sft"] and environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["ACCELERATE_USE_CPU"] == "False"


def test_two_processes_without_a_gpu_find_each_other_by_gloo(tmp_path):
    script = tmp_path / "sum.py"
    script.write_text(
        "import torch; from accelerate import Accelerator; a = Accelerator()\n"
        "x = a.reduce(torch.tensor([float(a.process_index + 1)]))\n"
        f"open({str(tmp_path)!r} + f'/{{a.process_index}}', 'w').write("
        "f'{torch.distributed.get_backend()} {a.num_processes} {x.item()}')\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / "two_processes_cpu.yaml"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["gloo 2 3.0"] * 2
