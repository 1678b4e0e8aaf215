"""What of a DeepSpeed configuration lite takes over, sets itself, or refuses; nothing here needs DeepSpeed."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lite.errors import ConfigError

STAGES = (0, 1, 2, 3)
# What lite's own arguments and calls say, and how they are written. A key that is off is no contradiction.
_OURS = {
    "fp16": "Lite(precision='16-mixed')",
    "bf16": "Lite(precision='bf16-mixed')",
    "bfloat16": "Lite(precision='bf16-mixed')",
    "amp": "Lite(precision='16-mixed')",
    "torch_autocast": "Lite(precision='bf16-mixed')",
    "data_types": "Lite(precision='32-true'), in which gradients are added up in float32",
    "gradient_clipping": "lite.clip_gradients(model, optimizer, max_norm=...)",
    "optimizer": "a torch optimizer that you pass to lite.setup(model, optimizer)",
    "scheduler": "a torch scheduler that you pass to lite.setup(model, optimizer, scheduler)",
    "gradient_accumulation_steps": "lite.accumulate(model, steps=...)",
    "managed_gradient_accumulation": "lite.accumulate(model, steps=...)",
    "tensor_parallel": "ModelParallelStrategy",
    "checkpoint": "lite.save and lite.load",
    "compile": "torch.compile",
    "train_batch_size": "the batch_size of your DataLoader",
}
# What DeepSpeed 0.19.8 reads besides. It ignores any other key without a word.
_THEIRS = [
    "activation_checkpointing",
    "aio",
    "autotuning",
    "comet",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_efficiency",
    "data_parallel_size",
    "dataloader_drop_last",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "hybrid_engine",
    "log_level",
    "memory_breakdown",
    "pipeline",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "steps_per_print",
    "tensorboard",
    "timers",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
]
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "gradient_accumulation_steps": (1,),
    "gradient_clipping": (0, 0.0, None),
    "managed_gradient_accumulation": (True,),
    "data_types": ({}, {"grad_accum_dtype": "fp32"}),
}
_ELSEWHERE = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params")


def read(stage: Any, config: Any) -> tuple[int, dict[str, Any]]:
    """Check a stage and a configuration, and bring them together.

    Args:
        stage: The argument; None leaves it to the configuration, or to stage 2.
        config: A dict, or the path of a JSON file, or None.

    Returns:
        The stage, and the configuration without what lite decides.

    Raises:
        ConfigError: The stage is not known, the file can't be read, or a key contradicts lite's own settings.
    """
    asked = _load(config)
    _check_keys(asked)
    asked = {key: value for key, value in asked.items() if not _is_auto(value)}
    for key, instead in _OURS.items():
        if key in asked and _says_something(key, asked[key]):
            raise ConfigError(
                f"config has {key!r}: {asked[key]!r}, which lite decides; leave {key!r} out, and use {instead}."
            )
        asked.pop(key, None)
    asked = _without_auto(asked)
    micro = asked.get("train_micro_batch_size_per_gpu", 1)
    if isinstance(micro, bool) or not isinstance(micro, int) or micro < 1:
        raise ConfigError(
            f"config has 'train_micro_batch_size_per_gpu': {micro!r}; it must be a whole number above 0, by which "
            "DeepSpeed counts samples. The batch_size of your DataLoader decides."
        )
    zero = asked.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ConfigError(f"config's 'zero_optimization' is {zero!r}; it must be a dict.")
    zero = dict(zero)
    theirs = zero.get("stage")
    if stage is None:
        stage = theirs if theirs is not None else 2
    stage = check_stage(stage)
    if theirs is not None and check_stage(theirs, "config's zero_optimization.stage") != stage:
        raise ConfigError(
            f"stage={stage} but config has 'zero_optimization': {{'stage': {theirs!r}}}; give one of the two."
        )
    for key in _ELSEWHERE:
        value = zero.get(key)
        if value and not (isinstance(value, Mapping) and value.get("device") in (None, "none")):
            raise ConfigError(
                f"config has 'zero_optimization': {{{key!r}: {value!r}}}, which lite does not drive; leave it out, or "
                "use FSDPStrategy(cpu_offload=True)."
            )
        zero.pop(key, None)
    if zero.pop("zenflow", None) is not None:
        raise ConfigError(
            "config has 'zero_optimization': {'zenflow': ...}, which offloads the optimizer, and lite does not drive; "
            "leave 'zenflow' out, or use FSDPStrategy(cpu_offload=True)."
        )
    if stage > 0 and asked.get("prescale_gradients"):
        raise ConfigError(
            f"config has 'prescale_gradients': {asked['prescale_gradients']!r}, which DeepSpeed has for stage 0 alone; "
            "leave it out."
        )
    if stage == 1 and zero.get("overlap_comm"):
        raise ConfigError(
            "config has 'zero_optimization': {'overlap_comm': True} with stage=1, whose gradients are reduced at the "
            "step, after backward; leave 'overlap_comm' out, or use stage=2."
        )
    asked["zero_optimization"] = {**zero, "stage": stage}
    return stage, asked


def check_stage(stage: Any, name: str = "stage") -> int:
    """Refuse what is no stage of ZeRO.

    Raises:
        ConfigError: It isn't.
    """
    if isinstance(stage, bool) or stage not in STAGES:
        raise ConfigError(f"{name}={stage!r} is not known; choose one of {', '.join(map(str, STAGES))}.")
    return int(stage)


def complete(config: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The configuration that DeepSpeed gets for one model."""
    whole = copy.deepcopy(dict(config))
    zero = whole["zero_optimization"]
    whole.setdefault("train_micro_batch_size_per_gpu", 1)  # it only counts samples by it
    whole["gradient_accumulation_steps"] = 1
    whole["gradient_clipping"] = 0.0  # DeepSpeed clips by itself otherwise, to 1
    whole["zero_allow_untested_optimizer"] = True
    # One bucket for all gradients of a small model, instead of 2 GB for any.
    numel = sum(p.numel() for p in module.parameters())
    zero.setdefault("reduce_bucket_size", min(500_000_000, max(numel, 1)))
    if zero["stage"] in (1, 2):
        # A norm would leave out steps with inf or NaN without a word; clipping has a policy for them.
        zero.setdefault("compute_grad_norm", False)
    return whole


def _load(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(f"config={config!r:.80} must be a dict, or the path of a JSON file.")
    path = Path(config)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config={str(config)!r} can't be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"config={str(config)!r} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(config)!r} holds a {type(content).__name__}; it must be a JSON object.")
    return content


def _check_keys(config: Mapping[str, Any]) -> None:
    known = [*_OURS, *_THEIRS]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out."
            raise ConfigError(f"config has {key!r}, which DeepSpeed does not know, and would ignore; {hint}")


def _is_auto(value: Any) -> bool:
    """Whether a value, or whether it is on, is left to DeepSpeed."""
    return value == "auto" or (isinstance(value, Mapping) and value.get("enabled") == "auto")


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(item) for key, item in value.items() if not isinstance(item, str) or item != "auto"}


def _says_something(key: str, value: Any) -> bool:
    if key in _HARMLESS:
        return value not in _HARMLESS[key]
    if isinstance(value, Mapping) and "enabled" in value:
        return bool(value["enabled"])
    return value is not None and value is not False and value != {}
