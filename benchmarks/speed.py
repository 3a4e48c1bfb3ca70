"""Everyone in turns: the loops that people have, this package, and the machine's limits."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPModel, CLIPProcessor

from benchmarks.limits import (
    IMAGES,
    TEXTS,
    attainable,
    flops_per_sample,
    limit_contenders,
    machine_contenders,
    matmul_rate,
)
from benchmarks.options import Options
from benchmarks.ours import RewriteFromScores, our_contenders
from benchmarks.peers import OperatorLoop, WebDatasetLoop, usual_threshold
from benchmarks.report import Report, bars
from benchmarks.rounds import Contender, Outcome, Spread, in_turns, ratios
from clipfilter_wds import ClipScorer

#: The loops in float32; the best of them is what the others are compared with.
_FP32_LOOPS = ("operator's loop, fp32", "webdataset loop, fp32")

#: The loop that is as lean as it gets without another precision, for whoever wonders where the speed comes from.
_TRIMMED = "webdataset loop, fp32, trimmed"

#: After the names of what is compiled.
_COMPILED = ", compiled"


def speed(options: Options, report: Report) -> None:
    """Samples per second of all contenders, as ratios to the best float32 loop and to the limit.

    Raises:
        SystemExit: When the contenders in the scorer's care don't keep the pairs that the float32 loops keep.
    """
    device = options.torch_device
    processor = CLIPProcessor.from_pretrained(options.model)
    scorer = ClipScorer(options.model, device=device)
    if options.compile and scorer.precision == "fp32":
        raise SystemExit(f"compile is for low precision, which pays neither on {device} nor in this model")
    fp32 = CLIPModel.from_pretrained(options.model, dtype=torch.float32).eval().to(device)
    low = fp32 if scorer.precision == "fp32" else _low_precision_model(options)
    threshold = usual_threshold(WebDatasetLoop(fp32, processor, options, threshold=0.0), options)
    contenders = [
        Contender(_FP32_LOOPS[0], OperatorLoop(fp32, processor, threshold), share=1 / 8),
        Contender(_FP32_LOOPS[1], WebDatasetLoop(fp32, processor, options, threshold=threshold), share=1 / 4),
        Contender(_TRIMMED, WebDatasetLoop(fp32, processor, options, threshold=threshold, trimmed=True), share=1 / 4),
        *(() if scorer.precision == "fp32" else [_low_precision_loop(options, low, processor, threshold)]),
        *our_contenders(options, scorer, threshold),
        *(_compiled(options, threshold) if options.compile else ()),
        Contender(RewriteFromScores.name, RewriteFromScores(options, shares=(1 / 8, 1))),
        *limit_contenders(options, low, scorer),
        *machine_contenders(scorer),
    ]
    wanted = [contender for contender in contenders if options.wants(contender.name)]
    rates, outcomes = in_turns(wanted, options.data, rounds=options.turns(), tell=report.tell)
    _check_decisions(outcomes)
    _report(options, report, rates, outcomes, scorer, low)


def _low_precision_model(options: Options) -> CLIPModel:
    return CLIPModel.from_pretrained(options.model, dtype=torch.bfloat16).eval().to(options.torch_device)


def _low_precision_loop(options: Options, model: CLIPModel, processor: CLIPProcessor, threshold: float) -> Contender:
    loop = WebDatasetLoop(model, processor, options, threshold=threshold)
    return Contender("webdataset loop, bf16", loop, share=1 / 2)


def _compiled(options: Options, threshold: float) -> list[Contender]:
    """What torch.compile makes of the scorer and of the bare model."""
    scorer = ClipScorer(options.model, device=options.torch_device, compile=True)
    model = _low_precision_model(options)
    model.get_image_features = torch.compile(model.get_image_features)
    model.get_text_features = torch.compile(model.get_text_features, dynamic=True)
    return [
        *our_contenders(options, scorer, threshold, suffix=_COMPILED),
        *limit_contenders(options, model, scorer, suffix=_COMPILED),
    ]


def _check_decisions(outcomes: Mapping[str, Outcome]) -> None:
    """Hold everyone to the reference, for as many samples as both have decided."""
    reference = next((outcomes[name] for name in reversed(_FP32_LOOPS) if name in outcomes), None)
    exact = [name for name in outcomes if "webdataset loop" not in name and outcomes[name].kept is not None]
    for name in exact if reference else []:
        both = min(outcomes[name].num_samples, reference.num_samples)
        ours, theirs = ({key for key in outcome.kept if int(key) < both} for outcome in (outcomes[name], reference))
        if ours != theirs:
            raise SystemExit(f"{name} does not keep what the float32 loop keeps; they differ in {ours ^ theirs}")


def _report(
    options: Options,
    report: Report,
    rates: dict[str, list[float]],
    outcomes: Mapping[str, Outcome],
    scorer: ClipScorer,
    low: CLIPModel,
) -> None:
    loops = [rates[name] for name in _FP32_LOOPS if name in rates]
    best = [max(turn) for turn in zip(*loops, strict=True)]
    limits = {
        f"limit{suffix}": limit
        for suffix in ("", _COMPILED)
        if (limit := attainable(rates, scorer.device, options.cores, suffix=suffix))
    }
    rows: list[dict[str, Any]] = []
    for name, values in {**rates, **limits}.items():
        row: dict[str, Any] = {"name": name, "rate": Spread.of(values)}
        if best:
            row["ratio"] = ratios(values, best)
        limit = limits.get("limit" + (_COMPILED if name.endswith(_COMPILED) else ""))
        if limit and name in outcomes and outcomes[name].kept is not None:
            row["share"] = ratios(values, limit)
        outcome = outcomes.get(name)
        if outcome and outcome.num_rechecked is not None:
            row["rechecked"] = f"{outcome.num_rechecked / outcome.num_samples:.1%}"
        rows.append(row)
    report.table(
        f"{options.size}, {options.image_size}-pixel JPEGs, {options.cores} cores, {options.workers} workers, "
        f"batches of {options.batch_size}, {scorer.device}, scorer in {scorer.precision}",
        {
            "": "name",
            "samples/s": "rate",
            "x best fp32 loop": "ratio",
            "share of limit": "share",
            "rechecked": "rechecked",
        },
        rows,
    )
    report.plot("speed", lambda axes: bars(axes, rows))
    report.add("speed", rows=rows, rates=rates, limits=limits, **_arithmetic(options, report, rates, scorer, low))


def _arithmetic(
    options: Options, report: Report, rates: dict[str, list[float]], scorer: ClipScorer, low: CLIPModel
) -> dict[str, Any]:
    """How much of the machine's arithmetic the forward pass gets out of it."""
    if not {IMAGES, TEXTS} <= rates.keys():
        return {}
    captions = [caption for _, caption in options.data().rows][: options.batch_size]
    ids = scorer.preprocess.tokenize([[caption] for caption in captions]).input_ids.to(low.device)
    flops = flops_per_sample(low, scorer.preprocess.view.crop, ids)
    matmul = matmul_rate(low.device, low.dtype)
    forward = [1 / (1 / images + 1 / texts) for images, texts in zip(rates[IMAGES], rates[TEXTS], strict=True)]
    share = Spread.of([flops * rate / matmul for rate in forward])
    report.tell(
        f"{flops / 1e9:.1f} GFLOP per sample; a large matrix product in {low.dtype} runs at "
        f"{matmul / 1e12:.2f} TFLOP/s, the towers at {share} of it"
    )
    return {"flops_per_sample": flops, "matmul_flops": matmul, "forward_share_of_matmul": share}
