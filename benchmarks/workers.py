"""Speed of a rewrite against the number of workers that decode."""

from dataclasses import replace

import torch
from transformers import CLIPModel, CLIPProcessor

from benchmarks.options import Options
from benchmarks.ours import Rewrite
from benchmarks.peers import WebDatasetLoop, usual_threshold
from benchmarks.report import Report
from benchmarks.rounds import Contender, Spread, in_turns, ratios
from clipfilter_wds import ClipScorer


def workers(options: Options, report: Report) -> None:
    """Rewrite with no worker, one, half as many as cores, and as many."""
    scorer = ClipScorer(options.model, device=options.torch_device)
    fp32 = CLIPModel.from_pretrained(options.model, dtype=torch.float32).eval().to(scorer.device)
    loop = WebDatasetLoop(fp32, CLIPProcessor.from_pretrained(options.model), options, threshold=0.0)
    threshold = usual_threshold(loop, options)
    numbers = sorted({0, 1, options.cores // 2, options.cores})
    contenders = [
        Contender(f"{number} workers", Rewrite(replace(options, num_workers=number), scorer, threshold))
        for number in numbers
    ]
    rates, _ = in_turns(contenders, options.data, rounds=options.turns(), tell=report.tell)
    rows = [
        {"name": name, "rate": Spread.of(values), "ratio": ratios(values, rates[contenders[0].name])}
        for name, values in rates.items()
    ]
    report.table(
        f"rewrite, {options.size}, {options.image_size}-pixel JPEGs, {options.cores} cores, {scorer.device}",
        {"": "name", "samples/s": "rate", "x without workers": "ratio"},
        rows,
    )
    report.add("workers", rows=rows, rates=rates)
