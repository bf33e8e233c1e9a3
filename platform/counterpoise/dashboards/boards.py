"""The three dashboards. Each panel answers one question, and its description says what bad looks like."""

from __future__ import annotations

from collections.abc import Callable

from counterpoise.dashboards.panels import (
    BLUE,
    DATASOURCE,
    GREEN,
    RED,
    RUNS,
    YELLOW,
    Column,
    Row,
    bars,
    datasource_variable,
    label_variable,
    line,
    number,
    place,
    query,
    rows,
    split_variable,
)
from counterpoise.dashboards.sdk import common_models, dashboard, models

# Where colours change, and where prometheus/rules.yml alerts.
GAP_NOTICE, GAP_WIDE = 0.10, 0.20
DATA_WAIT_HIGH = 0.5
STALLED_S = 300
CHECKPOINT_OLD_S = 1800

IMBALANCE, SWEEP, TRAINING = "counterpoise-imbalance", "counterpoise-sweep", "counterpoise-training"
KEYS = "run, corpus, method"
MODALITIES = f'{RUNS},modality=~"$modality"'
SPLIT = 'split="$split"'


def of(metric: str, *more: str, selector: str = RUNS) -> str:
    """The metric's series of the chosen runs."""
    return f"counterpoise_{metric}{{{','.join((selector, *more))}}}"


def max_by(expr: str, *labels: str) -> str:
    """One series per run, whatever other labels (instance, job) the scrape put on it."""
    return f"max by ({', '.join((KEYS, *labels))}) ({expr})"


def ended_too(expr: str) -> str:
    """The last value within the time that is shown: what has ended is no longer scraped."""
    return f"last_over_time({expr}[$__range])"


def _running() -> str:
    """What follows `and` to keep only runs that train now."""
    states = of("run_state", 'state="running"')
    return f"on ({KEYS}) ({max_by(states)} == 1)"


def _link(board: str, variables: str) -> str:
    return f"/d/{board}?{variables}&${{__url_time_range}}"


def _board(uid: str, title: str, description: str, *, span: str) -> dashboard.Dashboard:
    board = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["counterpoise"])
        .time(f"now-{span}", "now")
        .refresh("10s")
        .timezone("browser")
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
    )
    # What is posted to the server, e.g. by `counterpoise dashboards push --annotations`.
    board = board.annotation(
        dashboard.AnnotationQuery()
        .name("Annotations & Alerts")
        .built_in(1)
        .datasource(common_models.DataSourceRef(type_val="grafana", uid="-- Grafana --"))
        .enable(True)
        .hide(True)
        .icon_color("rgba(0, 211, 255, 1)")
        .type("dashboard")
    )
    board = board.with_variable(datasource_variable())
    for text, other in (("Imbalance", IMBALANCE), ("Sweep", SWEEP), ("Training", TRAINING)):
        if other != uid:
            board = board.link(
                dashboard.DashboardLink(text)
                .type(models.DashboardLinkType.LINK)
                .url(f"/d/{other}")
                .icon("dashboard")
                .include_vars(True)
                .keep_time(True)
            )
    return board


def _choose_runs(board: dashboard.Dashboard, *, sweep: bool = False) -> dashboard.Dashboard:
    info = "counterpoise_run_info"
    wanted = ""
    if sweep:
        board = board.with_variable(
            label_variable("sweep", "sweep", info, "Sweep", "Comparison or sweep that the runs belong to.")
        )
        wanted = 'sweep=~"$sweep",'
    corpus = f"{info}{{{wanted.rstrip(',')}}}" if wanted else info
    board = board.with_variable(label_variable("corpus", "corpus", corpus, "Corpus", "Corpora of the runs."))
    chosen = f'{info}{{{wanted}corpus=~"$corpus"}}'
    board = board.with_variable(label_variable("method", "method", chosen, "Method", "Methods of the runs."))
    chosen = f'{info}{{{wanted}corpus=~"$corpus",method=~"$method"}}'
    return board.with_variable(label_variable("run", "run", chosen, "Run", "Runs to show."))


def _choose_modality(board: dashboard.Dashboard) -> dashboard.Dashboard:
    metric = f"counterpoise_modality_accuracy{{{RUNS}}}"
    return board.with_variable(label_variable("modality", "modality", metric, "Modality", "Modalities to show."))


def _decisions(board: dashboard.Dashboard) -> dashboard.Dashboard:
    """ACA as marks at the time of the decision; Prometheus' own sampling would merge and delay them."""
    return board.annotation(
        dashboard.AnnotationQuery()
        .name("Classifier added")
        .datasource(DATASOURCE)
        .enable(True)
        .icon_color("purple")
        .expr(f"{of('classifier_added_timestamp_seconds', selector=MODALITIES)} * 1000")
        .title_format("{{run}}")
        .text_format("{{modality}} got a classifier")
        .tag_keys("modality,method")
        .use_value_for_time(True)
        .step("5s")
    )


def _weights() -> str:
    """Of the second classifiers, and of the later ones that differ: where all share a weight, one line says it."""

    def those(which: str) -> str:
        return max_by(of("classifier_weight", which, selector=MODALITIES), "modality", "classifier")

    second, later = those('classifier="2"'), those('classifier!~"1|2"')
    return f"{second} or ({later} != on ({KEYS}, modality) group_left () {second})"


def imbalance() -> dashboard.Dashboard:
    board = _board(
        IMBALANCE,
        "Counterpoise / Imbalance (live)",
        "Which modality wins, which one starves, and what the method does about it, while runs train.",
        span="30m",
    )
    board = _decisions(_choose_modality(_choose_runs(board)).with_variable(split_variable()))
    accuracy = max_by(of("modality_accuracy", SPLIT, selector=MODALITIES), "modality")
    all_modalities = of("modality_accuracy", SPLIT)
    fused, gap = max_by(of("fused_accuracy", SPLIT)), max_by(of("accuracy_gap", SPLIT))
    gap_steps = ((GAP_NOTICE, YELLOW), (GAP_WIDE, RED))
    health = Row(
        "How it stands",
        [
            (
                7,
                [
                    (_runs_table(), 16),
                    (
                        number(
                            "Firing alerts",
                            "Alerts of these runs that fire now; the rules are in prometheus/rules.yml. Bad: anything "
                            "but 0; the Training dashboard lists them.",
                            query('count(ALERTS{alertstate="firing",run=~"$run"}) or vector(0)'),
                            steps=((1, RED),),
                        ),
                        4,
                    ),
                    (
                        number(
                            "Widest gap",
                            "The widest gap between the modalities of one run. Yellow from 10, red from 20 percentage "
                            "points: then one modality is barely trained.",
                            query(f"max({of('accuracy_gap', SPLIT)})"),
                            unit="percentunit",
                            steps=gap_steps,
                            decimals=1,
                        ),
                        4,
                    ),
                ],
            ),
            (
                4,
                [
                    (
                        number(
                            "Gap of $run",
                            "Accuracy of the best modality minus that of the worst. It should fall or stay small; red "
                            "for long means that this run is imbalanced and its method does not mend it.",
                            query(f'max(counterpoise_accuracy_gap{{run="$run",{SPLIT}}})'),
                            unit="percentunit",
                            steps=gap_steps,
                            decimals=1,
                        )
                        .repeat("run")
                        .repeat_direction("h")
                        .max_per_row(6),
                        24,
                    )
                ],
            ),
        ],
    )
    balance = Row(
        "Balance",
        [
            (
                9,
                [
                    (
                        line(
                            "Accuracy per modality",
                            "Each modality predicting alone. Bad: one rises early and flattens while another stays "
                            "near chance. How it is measured differs by method: see `counterpoise methods show`.",
                            query(accuracy, "{{run}} {{modality}}"),
                            unit="percentunit",
                            low=0,
                            high=1,
                        ),
                        12,
                    ),
                    (
                        line(
                            "Accuracy gap",
                            "Best minus worst modality, in points of accuracy. Dashed at 10 and 20. Bad: above 20 for "
                            "long, or growing.",
                            query(gap, "{{run}}"),
                            unit="percentunit",
                            low=0,
                            marks=gap_steps,
                        ),
                        12,
                    ),
                ],
            ),
            (
                8,
                [
                    (
                        line(
                            "Fused accuracy",
                            "All modalities together: what the run is for. Bad: below the best modality alone.",
                            query(fused, "{{run}}"),
                            unit="percentunit",
                            low=0,
                            high=1,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Gain of fusion",
                            "Fused accuracy minus that of the best modality alone. Bad: below 0, then the other "
                            "modalities do harm.",
                            query(f"{fused} - {max_by(all_modalities)}", "{{run}}"),
                            unit="percentunit",
                            marks=((0, GREEN),),
                            first=RED,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Relative gap",
                            "The gap as a share of the best modality's accuracy: compares runs of different accuracy. "
                            "Bad: near 1, the worst modality knows nothing.",
                            query(f"{gap} / {max_by(all_modalities)}", "{{run}}"),
                            unit="percentunit",
                            low=0,
                            high=1,
                        ),
                        8,
                    ),
                ],
            ),
            (
                8,
                [
                    (
                        line(
                            "True-class probability per modality",
                            "Mean probability that a modality gives the true class: the score that ACA compares. It "
                            "moves before accuracy does. Bad: curves that part and stay apart.",
                            query(
                                max_by(of("modality_score", SPLIT, selector=MODALITIES), "modality"),
                                "{{run}} {{modality}}",
                            ),
                            unit="percentunit",
                            low=0,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Train minus valid per modality",
                            "Accuracy on train minus accuracy on valid. Bad: the leading modality overfits (far above "
                            "0) while the weak one has not yet learnt.",
                            query(
                                max_by(of("modality_accuracy", 'split="train"', selector=MODALITIES), "modality")
                                + " - "
                                + max_by(of("modality_accuracy", 'split="valid"', selector=MODALITIES), "modality"),
                                "{{run}} {{modality}}",
                            ),
                            unit="percentunit",
                        ),
                        8,
                    ),
                    (
                        bars(
                            "Weakest modality",
                            "The modality of each run with the lowest accuracy, and that accuracy. Bad: near chance "
                            "when the run is half done.",
                            query(
                                f"bottomk by (run) (1, {max_by(all_modalities, 'modality')})", "{{run}} {{modality}}"
                            ),
                            unit="percentunit",
                            high=1,
                            decimals=1,
                        ),
                        8,
                    ),
                ],
            ),
        ],
    )
    decisions = Row(
        "What the method decides",
        [
            (
                9,
                [
                    (
                        line(
                            "Score ratio and thresholds of ACA",
                            "A modality's score over the mean of the others. Below the low threshold (sigma - tau) it "
                            "is behind, and AUG gives it a classifier at the next decision; other methods have no "
                            "thresholds. Bad: a modality that stays far below 1.",
                            query(max_by(of("score_ratio", selector=MODALITIES), "modality"), "{{run}} {{modality}}"),
                            query(f"max by (bound) ({of('score_ratio_threshold')})", "threshold {{bound}}"),
                            log=True,
                            none="no run with two modalities",
                        ),
                        8,
                    ),
                    (
                        line(
                            "Classifiers per modality",
                            "Height of each modality's stack. Purple marks are decisions. Bad: it grows at every "
                            "decision until the limit and the gap does not close.",
                            query(max_by(of("classifiers", selector=MODALITIES), "modality"), "{{run}} {{modality}}"),
                            low=0,
                            steps=True,
                        ).decimals(0),
                        8,
                    ),
                    (
                        line(
                            "Weights of classifiers",
                            "What added classifiers count in their modality's prediction. The first counts 1; those "
                            "that count as much as the second are not drawn. AUG has one weight for them all, fixed or "
                            "learned, gradient boosting one for each. Bad: near 0 for long, then they change nothing.",
                            query(_weights(), "{{run}} {{modality}} {{classifier}}"),
                            low=0,
                            none="no method here has any",
                        ),
                        8,
                    ),
                ],
            ),
            (
                7,
                [
                    (
                        bars(
                            "Classifiers added",
                            "Since the process started. Bad: all of them to the modality that leads.",
                            query(
                                max_by(of("classifiers_added_total", selector=MODALITIES), "modality"),
                                "{{run}} {{modality}}",
                            ),
                            decimals=0,
                            none="no classifier was added",
                        ),
                        8,
                    ),
                    (
                        bars(
                            "Since the last classifier",
                            "Time since a modality got a classifier; absent if it never did. Information, not a fault.",
                            query(
                                "time() - "
                                + max_by(of("classifier_added_timestamp_seconds", selector=MODALITIES), "modality"),
                                "{{run}} {{modality}}",
                            ),
                            unit="s",
                            decimals=0,
                            none="no classifier was added",
                        ),
                        8,
                    ),
                    (
                        line(
                            "Coefficients and branch weights",
                            "What a method computes as it trains: modulation of gradients, weights of branches. Bad: "
                            "stuck at an end of its range. Methods without such numbers have none.",
                            query(
                                max_by(of("coefficient", selector=MODALITIES), "coefficient", "modality"),
                                "{{run}} {{coefficient}} {{modality}}",
                            ),
                            query(
                                max_by(of("branch_weight", selector=MODALITIES), "modality"),
                                "{{run}} weight of {{modality}}",
                            ),
                            none="no method here has any",
                        ),
                        8,
                    ),
                ],
            ),
        ],
    )
    return place(board, [health, balance, decisions])


def _runs_table() -> object:
    return rows(
        "Runs",
        "Runs that are shown, also those that ended within the time range. Bad: failed, or a gap in red. A click on a "
        "run shows its speed and health.",
        [
            Column("run", "Run", link=_link(TRAINING, "var-run=${__value.raw:percentencode}"), link_title="Training"),
            Column("corpus", "Corpus", width=110),
            Column("method", "Method", width=110),
            Column("state", "State", width=100),
            Column("Value #B", "Done", "percentunit", 0, 70),
            Column("Value #C", "Accuracy", "percentunit", 1, 90),
            Column("Value #D", "Gap", "percentunit", 1, 80, GREEN, ((GAP_NOTICE, YELLOW), (GAP_WIDE, RED))),
        ],
        query(f"{max_by(ended_too(of('run_state')), 'state')} == 1"),
        query(max_by(ended_too(of("progress_ratio")))),
        query(max_by(ended_too(of("fused_accuracy", SPLIT)))),
        query(max_by(ended_too(of("accuracy_gap", SPLIT)))),
        sort="State",
    )


def sweep() -> dashboard.Dashboard:
    board = _board(
        SWEEP,
        "Counterpoise / Sweep",
        "Trials of a comparison or sweep side by side. Ranked by valid (or train), never by test. The table in the "
        "sweep's folder is the lasting result: this one sees only what Prometheus still has.",
        span="6h",
    )
    board = _choose_runs(board, sweep=True).with_variable(split_variable())
    fused, gap = of("fused_accuracy", SPLIT), of("accuracy_gap", SPLIT)
    best = max_by(f"max_over_time({fused}[$__range])")
    to_run = "var-run=${__value.raw:percentencode}"
    overview = Row(
        "Trials",
        [
            (
                4,
                [
                    (
                        number(
                            title,
                            description,
                            query(
                                f"count(max by (run) (last_over_time({of('run_state', selector=f'{RUNS},{states}')}"
                                "[$__range])) == 1) or vector(0)"
                            ),
                            first=first,
                            steps=steps,
                        ),
                        6,
                    )
                    for title, states, first, steps, description in (
                        (
                            "Running",
                            'state="running"',
                            BLUE,
                            (),
                            "Trials that train now. Bad: fewer than there is room for.",
                        ),
                        (
                            "Finished",
                            'state="finished"',
                            GREEN,
                            (),
                            "Trials that came to their end in the time shown. Bad: it does not grow.",
                        ),
                        (
                            "Stopped early",
                            'state=~"stopped|interrupted"',
                            GREEN,
                            ((1, YELLOW),),
                            "Trials that a scheduler stopped, or somebody interrupted. Bad only if nobody meant to.",
                        ),
                        (
                            "Failed",
                            'state="failed"',
                            GREEN,
                            ((1, RED),),
                            "Trials that failed. Bad: any; the run folder says why.",
                        ),
                    )
                ],
            ),
            (
                11,
                [
                    (
                        rows(
                            "Leaderboard",
                            "Best accuracy so far, the gap and classifiers at last. A click on a run opens it. Bad: a "
                            "high accuracy with a wide gap, which one modality carries alone.",
                            [
                                Column("run", "Run", link=_link(IMBALANCE, to_run), link_title="Show this run"),
                                Column("corpus", "Corpus", width=130),
                                Column("method", "Method", width=130),
                                Column("Value #A", "Best accuracy", "percentunit", 2, 130),
                                Column(
                                    "Value #B",
                                    "Gap",
                                    "percentunit",
                                    1,
                                    100,
                                    GREEN,
                                    ((GAP_NOTICE, YELLOW), (GAP_WIDE, RED)),
                                ),
                                Column("Value #C", "Classifiers", "short", 0, 110),
                                Column("Value #D", "Epoch", "short", 0, 90),
                                Column("Value #E", "s per epoch", "s", 2, 110),
                            ],
                            query(best),
                            query(max_by(ended_too(gap))),
                            query(f"sum by ({KEYS}) ({max_by(ended_too(of('classifiers')), 'modality')})"),
                            query(max_by(ended_too(of("epoch")))),
                            query(max_by(ended_too(of("epoch_seconds")))),
                            sort="Best accuracy",
                        ),
                        24,
                    )
                ],
            ),
        ],
    )
    compared = Row(
        "Methods",
        [
            (
                8,
                [
                    (
                        bars(
                            "Accuracy by method",
                            "Mean over runs of the best accuracy so far, unfinished runs included: a first look, "
                            "without a test. Bad: a method far below `joint`.",
                            query(f"avg by (method, corpus) ({best})", "{{method}} on {{corpus}}"),
                            unit="percentunit",
                            high=1,
                            decimals=2,
                        ),
                        8,
                    ),
                    (
                        bars(
                            "Gap by method",
                            "Mean over runs of the last gap between modalities. Bad: red, above 20 points.",
                            query(f"avg by (method, corpus) ({max_by(ended_too(gap))})", "{{method}} on {{corpus}}"),
                            unit="percentunit",
                            high=1,
                            first=GREEN,
                            steps=((GAP_NOTICE, YELLOW), (GAP_WIDE, RED)),
                            decimals=1,
                        ),
                        8,
                    ),
                    (
                        bars(
                            "Time per epoch by method",
                            "Mean over runs of the last epoch's training time. Bad: a method that costs several times "
                            "what `joint` costs.",
                            query(
                                f"avg by (method, corpus) ({max_by(ended_too(of('epoch_seconds')))})",
                                "{{method}} on {{corpus}}",
                            ),
                            unit="s",
                            decimals=2,
                        ),
                        8,
                    ),
                ],
            ),
            (
                9,
                [
                    (
                        line(
                            "Fused accuracy of every run",
                            "By time. Bad: runs of one method that part widely, then the seed decides.",
                            query(max_by(fused), "{{run}}"),
                            unit="percentunit",
                            low=0,
                            high=1,
                        ),
                        12,
                    ),
                    (
                        line(
                            "Gap of every run",
                            "By time, dashed at 10 and 20 points. Bad: above 20 for long.",
                            query(max_by(gap), "{{run}}"),
                            unit="percentunit",
                            low=0,
                            marks=((GAP_NOTICE, YELLOW), (GAP_WIDE, RED)),
                        ),
                        12,
                    ),
                ],
            ),
            (
                8,
                [
                    (
                        bars(
                            "Progress",
                            "Share of its batches that a run has done, of running ones. Bad: one that stands still "
                            "while others get on.",
                            query(f"{max_by(of('progress_ratio'))} and {_running()}", "{{run}}", instant=True),
                            none="nothing runs",
                            unit="percentunit",
                            high=1,
                            decimals=0,
                        ),
                        12,
                    ),
                    (
                        bars(
                            "Classifiers added by run",
                            "How often ACA acted, the 20 highest. Bad: seeds of one method that differ much.",
                            query(
                                f"topk(20, {max_by(ended_too(of('classifiers_added_total')), 'modality')}) > 0",
                                "{{run}} {{modality}}",
                                instant=True,
                            ),
                            decimals=0,
                            none="no classifier was added",
                        ),
                        12,
                    ),
                ],
            ),
        ],
    )
    return place(board, [overview, compared])


def training() -> dashboard.Dashboard:
    board = _board(
        TRAINING,
        "Counterpoise / Training health and throughput",
        "Whether runs get on, how fast, what they wait for, and how their machines are.",
        span="30m",
    )
    board = _decisions(_choose_modality(_choose_runs(board)).with_variable(split_variable()))
    step = f"sum by ({KEYS}) (rate({of('step_seconds_total')}[$__rate_interval]))"
    steps = f"sum by ({KEYS}) (rate({of('steps_total')}[$__rate_interval]))"
    checkpoint = max_by(of("checkpoint_timestamp_seconds"))
    running = _running()
    health = Row(
        "Health",
        [
            (
                7,
                [
                    (_runs_table(), 14),
                    (
                        rows(
                            "Firing alerts",
                            "What the rules of prometheus/rules.yml complain about now. Good: none.",
                            [
                                Column("alertname", "Alert"),
                                Column("severity", "Severity", width=90),
                                Column("run", "Run"),
                                Column("instance", "Target", width=140),
                            ],
                            query('ALERTS{alertstate="firing",alertname=~"Counterpoise.*"}'),
                            none="No alert fires",
                        ),
                        10,
                    ),
                ],
            ),
            (
                5,
                [
                    (
                        number(
                            "Scrape targets",
                            "1: Prometheus reaches it, 0: not. Bad: 0 for a run that should train. Targets of runs "
                            "that ended disappear.",
                            query('up{job=~"counterpoise|ray|node|gpu"}', "{{job}} {{instance}}", instant=True),
                            none="nothing is scraped",
                            first=RED,
                            steps=((1, GREEN),),
                            name=True,
                        ),
                        6,
                    ),
                    (
                        number(
                            "Since the last step",
                            "Of running runs. Red from 5 minutes: stalled, or a very long evaluation.",
                            query(
                                f"time() - {max_by(of('last_step_timestamp_seconds'))} and {running}",
                                "{{run}}",
                                instant=True,
                            ),
                            unit="s",
                            steps=((60, YELLOW), (STALLED_S, RED)),
                            none="nothing runs",
                            decimals=0,
                        ),
                        4,
                    ),
                    (
                        number(
                            "Age of the last checkpoint",
                            "What a crash now would cost, of running runs. Red from 30 minutes; by default one is "
                            "written every minute.",
                            query(f"time() - {checkpoint} and {running}", "{{run}}", instant=True),
                            unit="s",
                            steps=((300, YELLOW), (CHECKPOINT_OLD_S, RED)),
                            none="none yet",
                            decimals=0,
                        ),
                        4,
                    ),
                    (
                        number(
                            "Worker restarts",
                            "How often workers died and the run went on from a checkpoint. Bad: more than a few; look "
                            "for memory or preemption.",
                            query(f"sum({ended_too(of('worker_restarts_total'))})", instant=True),
                            steps=((1, YELLOW), (3, RED)),
                        ),
                        3,
                    ),
                    (
                        number(
                            "Failures",
                            "Failures of these runs, a loss of NaN among them. Bad: any.",
                            query(f"sum({ended_too(of('failures_total'))})", instant=True),
                            steps=((1, RED),),
                        ),
                        3,
                    ),
                    (
                        number(
                            "Skipped rows",
                            "Rows that could not be decoded and were left out; the run's ledger.jsonl names them. Bad: "
                            "more than a handful.",
                            query(f"sum({ended_too(of('skipped_rows_total'))})", instant=True),
                            steps=((1, YELLOW),),
                        ),
                        4,
                    ),
                ],
            ),
        ],
    )
    speed = Row(
        "Throughput",
        [
            (
                8,
                [
                    (
                        line(
                            "Samples per second",
                            "Over all workers. Bad: falling, or far below what `counterpoise bench` measures here.",
                            query(f"sum by ({KEYS}) (rate({of('samples_total')}[$__rate_interval]))", "{{run}}"),
                            low=0,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Time per step",
                            "Waiting for data included. It grows with every classifier that ACA adds. Bad: a jump "
                            "without a decision.",
                            query(f"{step} / ({steps} > 0)", "{{run}}"),
                            unit="s",
                            low=0,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Share of time that waits for data",
                            "Of step time, over 5 minutes. Bad: above the dashed half, training starves: more decode "
                            "threads, a cache, or a nearer bucket.",
                            query(max_by(f"counterpoise:data_wait_share:rate5m{{{RUNS}}}"), "{{run}}"),
                            unit="percentunit",
                            low=0,
                            high=1,
                            marks=((DATA_WAIT_HIGH, RED),),
                        ),
                        8,
                    ),
                ],
            ),
            (
                8,
                [
                    (
                        bars(
                            "Progress",
                            "Share of its batches that a run has done, of running ones. Bad: one that stands still.",
                            query(f"{max_by(of('progress_ratio'))} and {running}", "{{run}}", instant=True),
                            none="nothing runs",
                            unit="percentunit",
                            high=1,
                            decimals=0,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Time left",
                            "As the run estimates it. Bad: it does not fall.",
                            query(max_by(of("remaining_seconds")), "{{run}}"),
                            unit="s",
                            low=0,
                        ),
                        8,
                    ),
                    (
                        line(
                            "Time of checkpoints and epochs",
                            "How long the last checkpoint and the last epoch took. Bad: checkpoints take as long as "
                            "epochs; the storage is slow.",
                            query(max_by(of("epoch_seconds")), "{{run}} epoch"),
                            query(max_by(of("checkpoint_seconds")), "{{run}} checkpoint"),
                            unit="s",
                            low=0,
                        ),
                        8,
                    ),
                ],
            ),
        ],
    )
    optimisation = Row(
        "Optimisation",
        [
            (
                8,
                [
                    (
                        line(
                            "Loss",
                            "Mean of an epoch. Bad: train falls while valid rises for long, or a curve that ends: NaN.",
                            query(max_by(of("loss", 'split=~"train|valid"'), "split"), "{{run}} {{split}}"),
                        ),
                        8,
                    ),
                    (
                        line(
                            "Loss within the epoch",
                            "Mean of the epoch so far. Bad: it jumps up and does not come down.",
                            query(max_by(of("running_loss")), "{{run}}"),
                        ),
                        8,
                    ),
                    (
                        line(
                            "Terms of the training loss",
                            "What the method adds up. Bad: one term that outweighs all others throughout.",
                            query(max_by(of("loss_term"), "term"), "{{run}} {{term}}"),
                        ),
                        8,
                    ),
                ],
            ),
            (
                7,
                [
                    (
                        line(
                            "Learning rate",
                            "Base rate of the last epoch. Bad: not what the schedule says.",
                            query(max_by(of("learning_rate")), "{{run}}"),
                            unit="sci",
                            low=0,
                        ).decimals(2),
                        8,
                    ),
                    (
                        bars(
                            "Events",
                            "What happened besides training: resumed, checkpoint_fallback, ... since the process "
                            "started. Bad: checkpoint_fallback, then a checkpoint was damaged.",
                            query(f"sum by (run, event) ({of('events_total')}) > 0", "{{run}} {{event}}"),
                            decimals=0,
                            none="nothing happened",
                        ),
                        8,
                    ),
                    (
                        number(
                            "Not shown here",
                            "Label values beyond the limits of the catalogue, and records that could not be read. "
                            "Good: 0; the runs' files have all of it.",
                            query("sum(counterpoise_exporter_left_out_total)", "label values"),
                            query("sum(counterpoise_exporter_unusable_records_total)", "records"),
                            steps=((1, RED),),
                            name=True,
                        ),
                        8,
                    ),
                ],
            ),
        ],
    )
    return place(board, [health, speed, optimisation, _machine(), _gpus(), _ray()])


def _machine() -> Row:
    busy = '1 - avg by (instance) (rate(node_cpu_seconds_total{mode="idle"}[$__rate_interval]))'
    received = 'sum by (instance) (rate(node_network_receive_bytes_total{device!="lo"}[$__rate_interval]))'
    none = "no node-exporter is scraped"
    return Row(
        "Machine (node-exporter)",
        [
            (
                8,
                [
                    (
                        line(
                            "CPU busy",
                            "Share of all cores. Bad: near 1 while data is waited for: decoding needs more cores.",
                            query(busy, "{{instance}}"),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                        ),
                        6,
                    ),
                    (
                        line(
                            "Memory in use",
                            "Share of memory that is not available. Bad: near 1, the kernel will kill something.",
                            query(
                                "1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes",
                                "{{instance}}",
                            ),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                            marks=((0.9, RED),),
                        ),
                        6,
                    ),
                    (
                        line(
                            "Disk in use",
                            "Of the file systems on disks. Bad: near 1, checkpoints will fail.",
                            query(
                                "max by (instance, mountpoint) (1 - node_filesystem_avail_bytes"
                                '{fstype!~"tmpfs|overlay"} / node_filesystem_size_bytes)',
                                "{{instance}} {{mountpoint}}",
                            ),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                            marks=((0.9, RED),),
                        ),
                        6,
                    ),
                    (
                        line(
                            "Network received",
                            "Bytes per second, loopback left out: what streaming from a bucket takes. Bad: at the "
                            "line's limit while data is waited for.",
                            query(received, "{{instance}}"),
                            unit="Bps",
                            none=none,
                            low=0,
                        ),
                        6,
                    ),
                ],
            )
        ],
        closed=True,
    )


def _gpus() -> Row:
    gram = "sum by (instance, GpuIndex) (ray_node_gram_used)"
    none = "no GPU is scraped"
    return Row(
        "GPUs (DCGM exporter, Ray)",
        [
            (
                8,
                [
                    (
                        line(
                            "GPU busy",
                            "Share of time in which the graphics engine works (DCGM), or utilisation (Ray). Bad: low "
                            "while runs train; look at the share that waits for data.",
                            query("avg by (Hostname, gpu) (DCGM_FI_PROF_GR_ENGINE_ACTIVE)", "{{Hostname}} {{gpu}}"),
                            query(
                                "avg by (instance, GpuIndex) (ray_node_gpus_utilization) / 100",
                                "{{instance}} {{GpuIndex}} (Ray)",
                            ),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                        ),
                        8,
                    ),
                    (
                        line(
                            "GPU memory in use",
                            "Share of each GPU's memory. Bad: near 1, another classifier may not fit.",
                            query(
                                "avg by (Hostname, gpu) (DCGM_FI_DEV_FB_USED"
                                " / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE))",
                                "{{Hostname}} {{gpu}}",
                            ),
                            query(
                                f"{gram} / ({gram} + sum by (instance, GpuIndex) (ray_node_gram_available))",
                                "{{instance}} {{GpuIndex}} (Ray)",
                            ),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                        ),
                        8,
                    ),
                    (
                        line(
                            "GPU temperature",
                            "In degrees Celsius. Bad: at the limit of the model, clocks will fall.",
                            query("max by (Hostname, gpu) (DCGM_FI_DEV_GPU_TEMP)", "{{Hostname}} {{gpu}}"),
                            unit="celsius",
                            none=none,
                        ),
                        8,
                    ),
                ],
            )
        ],
        closed=True,
    )


def _ray() -> Row:
    memory = "sum by (instance, SessionName) (ray_node_mem_used_host)"
    blocked = "sum by (dataset) (rate(ray_data_iter_total_blocked_seconds[$__rate_interval]))"
    none = "no Ray cluster is scraped"
    return Row(
        "Ray",
        [
            (
                8,
                [
                    (
                        line(
                            "CPU of Ray's nodes",
                            "Share of each node's cores. Bad: one node at 1 and others idle.",
                            query(
                                "avg by (instance, SessionName) (ray_node_cpu_utilization) / 100",
                                "{{instance}} {{SessionName}}",
                            ),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                        ),
                        6,
                    ),
                    (
                        line(
                            "Memory of Ray's nodes",
                            "Share of each node's memory. Bad: above 0.95 Ray kills workers.",
                            query(
                                f"{memory} / sum by (instance, SessionName) (ray_node_mem_total_host)",
                                "{{instance}} {{SessionName}}",
                            ),
                            unit="percentunit",
                            none=none,
                            low=0,
                            high=1,
                            marks=((0.95, RED),),
                        ),
                        6,
                    ),
                    (
                        line(
                            "Object store in use",
                            "Bytes of Ray's object store by place. Bad: SPILLED grows, then data goes over the disk.",
                            query("sum by (Location) (ray_object_store_memory)", "{{Location}}"),
                            unit="bytes",
                            none=none,
                            low=0,
                        ),
                        6,
                    ),
                    (
                        line(
                            "Ray Data: blocked",
                            "Seconds per second in which training waits for Ray Data, by dataset. Bad: near 1.",
                            query(blocked, "{{dataset}}"),
                            unit="percentunit",
                            none=none,
                            low=0,
                        ),
                        6,
                    ),
                ],
            )
        ],
        closed=True,
    )


# file name: what builds it
BOARDS: dict[str, Callable[[], dashboard.Dashboard]] = {
    "imbalance": imbalance,
    "sweep": sweep,
    "training": training,
}
