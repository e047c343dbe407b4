"""What a job's model is run with: levels and sampler, conditions, precision, batch, compiled or not."""

import math
import shutil
from pathlib import Path

from boomgen import catalog, env, models
from boomgen.errors import UsageError
from boomgen.job import Job
from boomgen.models import ModelInfo
from boomgen.plan import ChainPlan, NetworkPlan, SourcePlan, t_boom_of
from boomgen.shard import sha256_file
from boomgen.sources.base import NO_LABEL

NEARLY_CLEAN = 0.999
"""abar above which an image comes out as good as unchanged."""
COMPILE_PAYS_FROM = 60e12
"""FLOP of a whole job above which compiling pays: about half an hour of one CPU core, against a minute of compiling."""
PROMPT = "a photo of a {class}"
MOST_ROWS = 10_000
"""Of a shard, unless the user says otherwise."""


def chain(job: Job, model: ModelInfo) -> ChainPlan:
    """The model's levels, the one of t_boom, and the way back from it."""
    from boomgen.models.chain import levels

    t_boom, steps = t_boom_of(job)
    made = levels(model, steps, job.spacing)
    level = made.level(t_boom)
    if job.mode == "anonymize" and made.abar(level) > NEARLY_CLEAN:
        raise UsageError(
            f"--t-boom {job.t_boom} is level {level} of {made.count}, abar {made.abar(level):.4f}: nearly the "
            "originals; use a greater --t-boom, more --steps, or augment"
        )
    return ChainPlan(
        level=level,
        a=tuple(made.a.tolist()),
        s=tuple(made.s.tolist()),
        t=tuple(made.t.tolist()),
        of_step=made.of_step,
        sampler=_sampler(job, model),
        snr=model.snr,
    )


def _sampler(job: Job, model: ModelInfo) -> str:
    name = job.sampler or model.sampler
    if name == "learned" and model.variance == "none":
        raise UsageError(f"--sampler learned with model {model.name}, which tells no variance; use ancestral")
    if name == "predictor-corrector" and model.prediction != "score":
        raise UsageError(f"--sampler predictor-corrector with model {model.name}; expected a variance-exploding one")
    if job.eta != 1 and name != "ancestral":
        raise UsageError(f"--eta {job.eta:g} with --sampler {name}; only ancestral has an eta")
    if model.prediction == "consistency" and name not in ("one-call", "renoise"):
        raise UsageError(f"--sampler {name} with consistency model {model.name}; expected one-call or renoise")
    return name


def network(
    folder: Path,
    job: Job,
    model: ModelInfo,
    device: str,
    rows: int,
    planned: ChainPlan,
    source: SourcePlan,
    labels: dict[int, int],
    preset: catalog.DataSet | None,
) -> NetworkPlan:
    """How the network is called. What it is told, and its compiled form, are written beside the plan.

    `preset`: of the data set, with its prompt and the ImageNet class of each label.
    """
    import torch

    from boomgen.models import conditions
    from boomgen.models.network import build, compile_network, example_inputs, flops

    guidance = model.guidance if job.guidance is None else job.guidance
    conditions.check_guidance(model, guidance)
    dtype = job.dtype or env.default_dtype(device)
    classes = _classes(model, source, labels, preset.imagenet_classes if preset else ())
    template = _template(job, model, source, preset)
    prompts = conditions.prompts_of(template, source.classes) if template is not None else ()
    tables = conditions.of_classes(model, classes)
    told = folder / "conditions.safetensors"
    if model.text:
        on = device if torch.cuda.is_available() else "cpu"  # a login node may have no GPU
        tables = conditions.encode_prompts(model, prompts, dtype, on)
        conditions.save(tables, told)
    batch = job.batch_size or max(1, min(64, 64 * 64**2 // model.size**2, rows, job.shard_size or rows))
    calls = job.cascade * _calls(planned) * (1 if guidance == 1 or model.tells_guidance else 2)
    cost = flops(model, tables)
    pays = device == "cpu" and cost * rows * calls > COMPILE_PAYS_FROM and shutil.which("g++") is not None
    package = folder / "network.pt2"
    if job.compile == "yes" or (job.compile is None and pays and not model.latent):
        torch.set_num_threads(1)
        eager = build(model, getattr(torch, dtype), guidance).to(device)
        compile_network(eager, example_inputs(model, batch, tables, device), package)
    return NetworkPlan(
        batch_size=batch,
        device=device,
        dtype=dtype,
        package_sha256=sha256_file(package) if package.exists() else None,
        flops=cost * batch,
        calls=calls,
        classes=classes,
        prompts=prompts,
        template=template if template is not None and conditions.CAPTION in template else None,
        conditions_sha256=sha256_file(told) if told.exists() else None,
        guidance=guidance,
    )


def _calls(planned: ChainPlan) -> int:
    """Evaluations of the denoiser per batch."""
    if planned.sampler == "one-call":
        return min(1, planned.level)
    return planned.level * (2 if planned.sampler == "predictor-corrector" else 1)


def _classes(
    model: ModelInfo, source: SourcePlan, labels: dict[int, int], imagenet: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The model's class of each label; refused where it needs one and there is none."""
    classes = models.class_map(model, source.classes, imagenet)
    if model.class_count and model.null_class is None and (classes is None or NO_LABEL in labels):
        without = "has images without a label" if classes is not None else "names others"
        raise UsageError(f"model {model.name} needs a class of its own for every image; {source.name} {without}")
    return classes


def asked_prompt(job: Job, preset: catalog.DataSet | None) -> str | None:
    """The prompt that the user or the data set's preset gives."""
    return job.prompt if job.prompt is not None else preset.prompt if preset else None


def _template(job: Job, model: ModelInfo, source: SourcePlan, preset: catalog.DataSet | None) -> str | None:
    """What a model that takes prompts is told; None for another."""
    if not model.text:
        if job.prompt is not None:
            raise UsageError(f"--prompt with model {model.name}, which takes none; drop it")
        return None
    telling = source.labels > 0 and job.labels == "keep"
    asked = asked_prompt(job, preset)
    template = asked if asked is not None else PROMPT if telling else None
    if template is None:
        raise UsageError(f"model {model.name} takes a prompt, and {source.name} shows no labels; give one by --prompt")
    if "{class}" in template and not source.labels:
        raise UsageError(f"--prompt {template!r} names the class, but {source.name} has no labels; drop {{class}}")
    if source.captions == 0:
        raise UsageError(f"--prompt {template!r}, but no image of {source.name} has a caption; drop {{caption}}")
    return template


def shard_size(rows: int, batch: int) -> int:
    """About 64 shards of whole batches, at most 10,000 rows each: small enough to redo, few enough to list."""
    whole = math.ceil(rows / (64 * batch)) * batch
    return max(batch, min(whole, MOST_ROWS // batch * batch))
