"""A plan in words, and its curves as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from counterpoise.planning.facts import Fact
from counterpoise.wording import duration

_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BAR = 20


def quantity(value: float, unit: str = "") -> str:
    """A number with a prefix and its unit: 3.35 TB/s, 20 us, 0.5."""
    if unit == "s":
        return seconds(value)
    if unit in ("", "h", "1/s", "1/day"):
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        return f"{text} {unit}".strip()
    for scale, prefix in _SCALES:
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    for scale, unit in ((1e-3, "us"), (1.0, "ms")):
        if value < scale:
            return f"{value / scale * 1e3:.3g} {unit}"
    return f"{value:.3g} s" if value < 100 else duration(value)


def lines(plan: Mapping[str, Any]) -> list[str]:
    """Everything there is to say, in the order in which it is asked."""
    return [
        *_work(plan), "", *_step(plan), *_scaling(plan), "", *_run(plan), *_sweep(plan), "", *_limits(plan), "",
        *assumptions([Fact(**fact) for fact in plan["assumptions"]], plan["calibrated"]),
    ]  # fmt: skip


def _plural(count: float, word: str) -> str:
    return f"{count:,.0f} {word}{'s' * (count != 1)}"


def _inside(plan: Mapping[str, Any]) -> int:
    return int(min(plan["devices"], plan["per_node"]))


def _work(plan: Mapping[str, Any]) -> list[str]:
    work = plan["work"]
    samples = ", ".join(f"{split} {count:,}" for split, count in work["samples"].items() if count)
    cached = "decoded once and kept in memory" if work["cached"] else "read and decoded in every epoch"
    return [
        f"work        {work['title']}; {work['parameters']:,.0f} parameters",
        f"            a sample and step: {quantity(work['flops_per_sample'], 'FLOP')}, "
        f"{quantity(work['bytes_per_sample'], 'B')} of memory traffic; {_plural(work['operations'], 'operation')} "
        f"({'given' if work['counted'] == 'given' else 'counted from the loop, ' + work['counted']})",
        f"corpus      {samples} samples of {quantity(work['bytes_per_sample_stored'], 'B')}: "
        f"{quantity(work['corpus_bytes'], 'B')} in {_plural(work['files'], 'file')}; {cached}",
        *(f"            {note}" for note in work["notes"]),
        f"cluster     {_plural(plan['nodes'], 'node')} x {_inside(plan)} {plan['device_title']}, "
        f"network {plan['network']}, store {plan['store']}; {plan['precision']}",
        f"batch       {plan['batch_size']:,} in all, {plan['batch_size'] // plan['devices']:,} on each device",
    ]


def _step(plan: Mapping[str, Any]) -> list[str]:
    step, work, source = plan["step"], plan["work"], plan["input"]
    parts = [("computing", "compute", ""), ("gradients", "gradients", ""), ("small messages", "small", "")]
    parts += [("packing", "packing", "copying gradients into one message and back"), ("optimizer", "optimizer", "")]
    parts += [("waiting for input", "wait", source["bound"] if source["streams"] and step["wait"] else "")]
    said = {
        "gradients": f"{quantity(work['all_reduce_bytes'], 'B')} in all messages, as if none were sent during backward",
        "small messages": f"{_plural(work['all_reduces'], 'all-reduce')} a step with those of gradients"
        + ("; two per layer of synchronised batch normalisation" if work["batch_norm"] == "sync" else ""),
    }
    found = [f"step        {seconds(step['total'])}, {plan['samples_per_s']:,.0f} samples/s"]
    for title, key, note in parts:
        if step[key] or title == "computing":
            share = step[key] / step["total"]
            note = said.get(title, note)
            found.append(f"            {title:18}{seconds(step[key]):>9}  {share:4.0%}  {note}".rstrip())
    return found


def _bar(share: float) -> str:
    return ("#" * round(_BAR * min(share, 1))).ljust(_BAR, ".")


def _scaling(plan: Mapping[str, Any]) -> list[str]:
    found = []
    for key, title in (
        ("strong", f"batch {plan['batch_size']:,} shared by all"),
        ("weak", f"batch {plan['per_device_batch']:,} on each device"),
    ):
        found += ["", f"scaling     {title}; efficiency of the devices (curve), and with waiting for input"]
        found += [f"            {'devices':>8} {'step':>9}  efficiency {'':{_BAR}}  with input"]
        for row in plan[key]:
            found.append(
                f"            {row['devices']:8,} {seconds(row['step_s']):>9}  {row['efficiency']:10.1%} "
                f"{_bar(row['efficiency'])}  {row['efficiency_with_input']:10.1%}"
            )
    return found


def _run(plan: Mapping[str, Any]) -> list[str]:
    run, work, source, memory = plan["run"], plan["work"], plan["input"], plan["memory"]
    found = [
        f"epoch       {duration(run['epoch_s'])}: {_plural(run['steps'], 'step')}, evaluation "
        f"{seconds(run['evaluation_s'])}, {_plural(run['checkpoints'], 'checkpoint')}",
        f"input       {'every' if source['streams'] else 'the first'} epoch reads the corpus "
        f"{source['amplification']:.3g} times over: a worker reads every row group that has a row of its own",
        f"            {quantity(source['bytes_per_s'], 'B/s')} and {source['requests_per_s']:,.0f} requests/s of the "
        f"store; {source['decode_cores_needed']:.1f} cores of a node decode, {source['decode_cores']:.0f} may"
        if source["streams"]
        else f"            filling the cache takes {duration(source['filling_s'])}",
        f"            opening it takes {duration(source['opening_s'])} once; ids and places of rows take "
        f"{quantity(source['index_bytes_per_node'], 'B')} of each node",
    ]
    if source["streams"]:
        bounds = sorted(source["seconds_per_step"].items(), key=lambda item: -item[1])
        slow = ", ".join(f"{name} {seconds(value)}" for name, value in bounds if value >= 1e-3 * bounds[0][1])
        found.append(f"            for a step: {slow}")
    found += [
        f"checkpoint  {quantity(plan['checkpoint_bytes'], 'B')} in {seconds(run['checkpoint_s'])}, "
        f"{run['checkpoint_share']:.1%} of the time; one every {duration(run['interval_s'])}, best would be "
        f"{duration(run['best_interval_s'])} (Young)",
        f"failures    one in {plan['mtbf_h']:,.0f} h, {run['failures']:.2g} in the run; {run['goodput']:.1%} of the "
        "time moves it on (Daly)",
        f"memory      {quantity(memory['total'], 'B')} of {quantity(memory['device'], 'B')}: weights, gradients and "
        f"optimizer {quantity(memory['weights'], 'B')}, activations {quantity(memory['activations'], 'B')}, evaluation "
        f"{quantity(memory['evaluation'], 'B')}, reserved {quantity(memory['reserved'], 'B')}",
        f"run         {work['epochs']:,} epochs in {duration(run['wall_s'])}, {plan['device_hours']:,.1f} device-hours"
        + _cost(plan, plan["device_hours"]),
    ]
    return found


def _cost(plan: Mapping[str, Any], device_hours: float) -> str:
    if plan["price"] is None:
        return " (--price per device-hour gives the cost)"
    return f", cost {device_hours * plan['price']:,.2f} at {plan['price']:g} per device-hour"


def _sweep(plan: Mapping[str, Any]) -> list[str]:
    sweep = plan.get("sweep")
    if sweep is None:
        return []
    early = "; as if none were stopped early" if sweep["scheduler"] in ("asha", "median") else ""
    return [
        f"sweep       {sweep['trials']:,} trials of {_plural(sweep['devices_per_trial'], 'device')}, "
        f"{sweep['at_once']:,} at a time: {duration(sweep['wall_s'])}, {sweep['device_hours']:,.1f} device-hours"
        + _cost(plan, sweep["device_hours"]) + early,
        f"            {sweep['puts_per_s']:.3g} writes/s of checkpoints, {sweep['puts_allowed']:,.0f}/s may be",
    ]  # fmt: skip


_AXES = {
    "devices, fixed batch": "as devices are added and the batch stays",
    "devices, growing batch": "as devices are added and the batch grows with them",
    "corpus": "as the corpus grows, on the planned devices",
}


def _limits(plan: Mapping[str, Any]) -> list[str]:
    found = ["what breaks first"]
    for axis, title in _AXES.items():
        found.append(f"  {title}")
        rows = [limit for limit in plan["limits"] if limit["axis"] == axis]
        for limit in rows:
            at = quantity(limit["at"], "B") if axis == "corpus" else f"{limit['at']:,.0f}"
            found.append(f"    {at:>9}  {limit['what']}")
            found.append(f"    {'':9}  -> {limit['remedy']}")
        if not rows:
            found.append("    nothing up to 1 PB" if axis == "corpus" else "    nothing up to 16,384 devices")
    return found


def assumptions(facts: Iterable[Fact], calibrated: str | None) -> list[str]:
    """Every number that was not counted."""
    found = [
        "assumptions (--set NAME=VALUE changes them)",
        f"  calibrated: {calibrated}"
        if calibrated
        else "  nothing is calibrated: data sheets and assumptions (--calibrate)",
    ]
    for fact in facts:
        source = f": {fact.source}" if fact.source else ""
        found.append(f"  {fact.name:32} {quantity(fact.value, fact.unit):>13}  {fact.meaning}")
        found.append(f"  {'':32} {'':13}  [{fact.origin}{source}]")
    return found


def plot(plan: Mapping[str, Any], place: str) -> None:
    """Efficiency over devices, and where a step's time goes, as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from counterpoise import storage

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label, color in (
        ("strong", f"batch {plan['batch_size']:,} shared", "#4269d0"),
        ("weak", f"batch {plan['per_device_batch']:,} each", "#ff725c"),
    ):
        devices = [row["devices"] for row in plan[key]]
        left.plot(devices, [row["efficiency"] for row in plan[key]], color=color, marker="o", ms=3, label=label)
        with_input = [row["efficiency_with_input"] for row in plan[key]]
        left.plot(devices, with_input, color=color, linestyle="--", label=f"{label}, with input")
    left.axvline(plan["devices"], color="#888888", linewidth=0.8)
    left.set(xscale="log", xlabel="devices", ylabel="efficiency", ylim=(0, 1.05), title="Scaling (line: this plan)")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.legend(frameon=False, fontsize=8)
    names = {"compute": "computing", "gradients": "gradients", "small": "small messages", "packing": "packing",
             "optimizer": "optimizer", "wait": "waiting for input"}  # fmt: skip
    values = [1e3 * plan["step"][key] for key in names]
    bars = right.barh(list(names.values()), values, color="#6cc5b0")
    right.bar_label(bars, [seconds(value / 1e3) for value in values], padding=3, fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.18)
    right.set(xlabel="ms", title=f"A step on {plan['devices']:,} devices")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    storage.write_bytes(place, content.getvalue())
