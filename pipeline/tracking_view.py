"""A prepared view of MLflow's table of experiments: the columns and charts that say what differs and how good it was.

MLflow's page shows no metric until a person adds its column. It also opens a shared view, which is a tag of the
experiment (mlflow.sharedViewState.<key>, plain JSON); this module writes that tag from the runs that are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pipeline.tracking_store import LEVEL, connect

__all__ = ["VIEW", "differing_params", "prepare_view", "view_state"]

VIEW = "sonoscope"
METRIC = "balanced_accuracy"
COLUMNS = (METRIC, "macro_auroc", "pretraining_gain")
"""Without the ends of the interval: a run's name has them."""
WIDTHS = {"attributes.`Run Name`": 460, "metrics": 140, "params": 150, "tags": 120}
MOST_PARAMS, MOST_RUNS, MOST_COMPARED = 6, 500, 50
ONLY_EXPERIMENTS = f"tags.`{LEVEL}` = 'execution'"


def differing_params(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose value is not the same in all runs, those with most different values first; a run may lack a key."""
    keys = sorted({key for params in runs for key in params})
    values = {key: {params.get(key) for params in runs} for key in keys}
    return sorted((key for key in keys if len(values[key]) > 1), key=lambda key: -len(values[key]))


def view_state(params: Sequence[str]) -> dict[str, Any]:
    """The state of MLflow's page with these parameters beside the metrics, experiments sorted by balanced accuracy."""
    names = list(params)[:MOST_PARAMS]
    columns = [f"metrics.`{name}`" for name in COLUMNS] + [f"params.`{name}`" for name in names] + ["tags.`dvc.experiment`", "tags.`stamp`"]
    order = ["attributes.`Run Name`", *columns]
    section = {"uuid": "sonoscope", "name": "Experiments", "display": True, "isReordered": False, "deleted": False, "isGenerated": False}

    def chart(kind: str, title: str, **more: Any) -> dict[str, Any]:
        name = title.lower().replace(" ", "-")
        return {
            "uuid": f"sonoscope-{name}", "type": kind, "displayName": title, "metricSectionId": "sonoscope", "runsCountToCompare": 100,
            "deleted": False, "isGenerated": False, **more,
        }

    charts = [chart("BAR", "Balanced accuracy", metricKey=METRIC)]
    if names:
        charts.insert(0, chart("PARALLEL", "What differs", selectedParams=names, selectedMetrics=[METRIC], showAllRuns=True))
        charts += [
            chart("SCATTER", f"By {name}", xaxis={"key": name, "type": "PARAM"}, yaxis={"key": METRIC, "type": "METRIC"}) for name in names
        ]
    return {
        "searchFilter": ONLY_EXPERIMENTS, "orderByKey": f"metrics.`{METRIC}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "selectedColumns": columns, "columnOrder": order, "columnWidths": {name: WIDTHS.get(name) or WIDTHS[name.split(".")[0]] for name in order},
        "runsHiddenMode": "SHOW_ALL", "compareRunCharts": charts, "compareRunSections": [section],
        "hideEmptyCharts": True,
    }


def prepare_view(uri: str, experiment: str) -> dict[str, str]:
    """Write the view into the experiment's tags.

    Returns:
        Addresses within MLflow's page: `table`, `charts`, and `compare` (the newest experiments side by side); {} when there
        is no experiment of this name yet.
    """
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    runs = client.search_runs([found.experiment_id], ONLY_EXPERIMENTS, max_results=MOST_RUNS, order_by=["attributes.start_time DESC"])
    judged = [run for run in runs if METRIC in run.data.metrics]
    state = view_state(differing_params([run.data.params for run in judged]))
    tags = {f"mlflow.sharedViewState.{VIEW}": json.dumps(state), "mlflow.experiment.primaryMetric.name": METRIC}
    for key, value in tags.items():
        client.set_experiment_tag(found.experiment_id, key, value)
    # Version 3 shows the side bar for language models unless told.
    place = f"#/experiments/{found.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    addresses = {"table": place, "charts": f"{place}&compareRunsMode=CHART"}
    if len(judged) > 1:
        chosen = (json.dumps(ids, separators=(",", ":")) for ids in ([run.info.run_id for run in judged[:MOST_COMPARED]], [found.experiment_id]))
        addresses["compare"] = "#/compare-runs?runs={}&experiments={}&workflowType=machine_learning".format(*map(quote, chosen))
    return addresses
