"""One night: the ternary variants drawn anew, a canary of the full-precision baseline, and the judgment over both.

The baseline is the accepted night's, as long as the full-precision model is the same; its images are scored again,
not drawn, where an evaluator changed, and so are the accepted night's ternary images.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from bitflux_core.errors import UserError
from cluster.manifests import FOLDERS, find_manifest, read_manifest
from cluster.night_files import Accepted, NightFiles, series_of
from cluster.plan import Plan, build_plan
from cluster.profile import Profile
from cluster.run import RunSummary
from cluster.store import ResultStore
from cluster.stored_images import StoredImages, read_image, stored_images
from cluster.workload import Workload
from evaluators.gates import IDENTICAL_DB, Against, CanaryGate, Gates, unknown_names
from evaluators.regression import (
    Finding,
    Pair,
    Status,
    judge_canary,
    judge_fidelity,
    judge_ratio,
    judge_scores,
    pair_up,
    psnr_db,
    worst,
)
from evaluators.statistics import Comparison

BASELINE = "bf16"
READERS = 8
COLUMNS = ["variant", "benchmark", "pair_id", "tag", "prompt", "prompt_index", "image_index", "score"]
COLUMNS += ["image_digest", "image_path", "evaluator_fingerprint"]

# Draws a plan into a store with the real models, or with stored images in place of them.
Draw = Callable[[Plan, ResultStore, StoredImages | None], RunSummary]


@dataclass(frozen=True)
class NightPlans:
    """What may be drawn: ternary variants, the whole baseline, a small part of it. All know their fingerprints."""

    variants: Plan
    baseline: Plan
    canary: Plan

    def with_canary(self, profile: Profile, workloads: Sequence[Workload], gate: CanaryGate) -> "NightPlans":
        """The plans with a canary as large as `gate` says, as far as the baseline goes."""
        images = min(w.images_per_prompt for w in self.baseline.workloads.values())
        prompts = min(gate.prompts_a_tag, profile.limit or gate.prompts_a_tag)
        few = build_plan(profile, workloads, (BASELINE,), prompts, min(gate.images_per_prompt, images))
        return replace(self, canary=few)

    def known(self, fingerprints: Mapping[str, str]) -> "NightPlans":
        """The plans with the fingerprints of their own variants and of the shared models."""

        def known(plan: Plan) -> Plan:
            others = {*self.variants.variants, BASELINE} - {*plan.variants}
            return replace(plan, fingerprints={k: v for k, v in fingerprints.items() if k not in others})

        return NightPlans(known(self.variants), known(self.baseline), known(self.canary))


@dataclass
class Night:
    """What a night found. `notes` say what was reused, drawn or scored again, and why; `runs` are ids by part."""

    name: str
    series: str
    accepted: Accepted | None
    runs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    comparisons: list[tuple[Against, Comparison]] = field(default_factory=list)
    pairs: dict[tuple[str, Against, str], list[Pair]] = field(default_factory=dict)
    models: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def verdict(self) -> Status:
        return worst(self.findings)


class _Incomplete(Exception):
    """A run of the night did not end; nothing can be judged."""


def load_gates(name_or_path: str, plan: Plan) -> Gates:
    """Gates by name or path. UserError names file and key of what is wrong, or can never apply to `plan`."""
    path = find_manifest("gates", name_or_path)
    try:
        gates = read_manifest(path, Gates)
    except UserError as error:
        raise UserError(f"{error}; correct it as in {FOLDERS['gates'] / 'mini.yaml'}") from error
    tags = {name: {prompt.tag for prompt in w.prompts.values()} for name, w in plan.workloads.items()}
    fault = unknown_names(gates, tags, {file.stem for file in FOLDERS["benchmark"].glob("*.yaml")})
    if fault:
        known = sorted({*tags, *set().union(*tags.values())})
        raise UserError(f"{path}: {fault}; name one of {', '.join(known)}, or leave the key out for all")
    return gates


def night_plans(profile: Profile, workloads: Sequence[Workload], variants: Sequence[str]) -> NightPlans:
    """The plans of a night, with the smallest canary: one image of the first prompt of each tag."""
    limit, images = profile.limit, profile.images_per_prompt
    return NightPlans(
        build_plan(profile, workloads, variants, limit, images),
        build_plan(profile, workloads, (BASELINE,), limit, images),
        build_plan(profile, workloads, (BASELINE,), 1, 1),
    )


def run_night(name: str, plans: NightPlans, gates: Gates, files: NightFiles, draw: Draw) -> Night:
    """Draws what the night needs and judges it. The same name again continues a night that was interrupted."""
    series = series_of(plans.baseline)
    night = Night(name, series, files.accepted(series))
    try:
        _Judge(night, plans, gates, files, draw).judge()
    except _Incomplete as error:
        night.findings.append(Finding("run", "incomplete", "", None, None, None, str(error)))
    return night


class _Judge:
    def __init__(self, night: Night, plans: NightPlans, gates: Gates, files: NightFiles, draw: Draw) -> None:
        self._night, self._plans, self._gates, self._files, self._draw = night, plans, gates, files, draw
        self._expected = {
            name: Counter(prompt.tag for prompt in w.prompts.values() for _ in range(w.images_per_prompt))
            for name, w in plans.variants.workloads.items()
        }

    def judge(self) -> None:
        night, plans = self._night, self._plans
        reused = self._reusable_baseline()
        canary = self._run("canary", plans.canary) if reused else None
        tonight = self._run("variants", plans.variants)
        rows = _rows(tonight)
        if reused:
            baseline = self._scored_alike(reused, plans.baseline, rows, "baseline")
        else:
            baseline = self._run("baseline", plans.baseline)
        night.runs["baseline"] = baseline.run_id
        baseline_rows = _rows(baseline)
        if canary and reused:
            self._judge_canary(canary, reused)
        self._compare("baseline", rows, dict.fromkeys(plans.variants.variants, baseline_rows))
        # What full precision takes is measured tonight, if only by the canary: the machine may be another.
        self._judge_costs("baseline", tonight, canary or baseline)
        if night.accepted is None:
            night.notes.append("no accepted night to compare with: tonight's ternary images stand against bf16 only")
            return
        accepted = self._accepted_variants(night.accepted, rows)
        if accepted:
            accepted_rows = _rows(accepted)
            shared = [v for v in plans.variants.variants if v in night.accepted.variants]
            references = {v: [row for row in accepted_rows if row["variant"] == v] for v in shared}
            self._compare("accepted", rows, references)
            self._judge_fidelity()
            self._judge_costs("accepted", tonight, self._files.store(night.accepted.variants_run), shared)

    def _run(self, part: str, plan: Plan, stored: StoredImages | None = None) -> ResultStore:
        """Draws `plan` as this night's `part`, or continues it. Raises _Incomplete."""
        store = self._files.store(f"{self._night.name}-{part}")
        self._night.runs[part] = store.run_id
        summary = self._draw(plan, store, stored)
        self._night.models[part] = [vars(model) for model in summary.models]
        if not summary.complete:
            raise _Incomplete(f"run {store.run_id}: {summary.reason} ({summary.n_done} of {summary.n_expected} images)")
        return store

    def _reusable_baseline(self) -> ResultStore | None:
        """The accepted baseline, unless there is none or another model drew it."""
        accepted = self._night.accepted
        if accepted is None:
            self._night.notes.append("the bf16 baseline was drawn tonight: there is no accepted night")
            return None
        store = self._files.store(accepted.baseline_run)
        drawn_by = (store.manifest() or {})["plan"]["fingerprints"][BASELINE]
        now = self._plans.baseline.fingerprint(BASELINE)
        if drawn_by != now:
            self._night.notes.append(f"the bf16 baseline was drawn tonight: its model changed from {drawn_by} to {now}")
            return None
        self._night.notes.append(f"the bf16 baseline is that of the accepted night {accepted.night}")
        return store

    def _scored_alike(self, store: ResultStore, plan: Plan, tonight: list[dict[str, Any]], part: str) -> ResultStore:
        """`store`, or a run of its images scored again, where tonight's evaluators are others."""
        now, then = _evaluators(tonight), _evaluators(_rows(store))
        changed = sorted(name for name in now if then.get(name) != now[name])
        if not changed:
            return store
        which = ", ".join(changed)
        self._night.notes.append(f"the evaluator of {which} changed: {part} images were scored again, not drawn")
        return self._run(f"{part}-rescored", plan, stored_images(store, plan))

    def _accepted_variants(self, accepted: Accepted, rows: list[dict[str, Any]]) -> ResultStore | None:
        """The accepted night's ternary images, scored as tonight's. None where it drew none of tonight's variants."""
        store = self._files.store(accepted.variants_run)
        fingerprints = (store.manifest() or {})["plan"]["fingerprints"]
        shared = [v for v in self._plans.variants.variants if v in accepted.variants]
        for variant in self._plans.variants.variants:
            if variant not in shared:
                self._night.findings.append(
                    Finding("run", "undecided", variant, "accepted", None, None, "the accepted night did not draw it")
                )
            elif fingerprints[variant] != self._plans.variants.fingerprint(variant):
                now = self._plans.variants.fingerprint(variant)
                self._night.notes.append(f"{variant}'s weights changed from {fingerprints[variant]} to {now}")
        if not shared:
            return None
        shards = tuple(shard for shard in self._plans.variants.shards if shard.key.variant in shared)
        now_known = self._plans.variants.fingerprints or {}
        scoring = {name: value for name, value in now_known.items() if name not in self._plans.variants.variants}
        plan = replace(
            self._plans.variants,
            variants=tuple(shared),
            shards=shards,
            fingerprints={**scoring, **{variant: fingerprints[variant] for variant in shared}},
        )
        return self._scored_alike(store, plan, rows, "accepted")

    def _compare(
        self,
        against: Against,
        rows: list[dict[str, Any]],
        references: Mapping[str, list[dict[str, Any]]],
    ) -> None:
        """Scores of every variant and benchmark against `references`, by variant."""
        for variant, reference_rows in references.items():
            for benchmark, expected in self._expected.items():
                mine = [r for r in rows if (r["variant"], r["benchmark"]) == (variant, benchmark)]
                theirs = [r for r in reference_rows if r["benchmark"] == benchmark]
                found, findings = judge_scores(self._gates, against, benchmark, variant, theirs, mine, expected)
                self._night.comparisons += [(against, comparison) for comparison in found]
                self._night.findings += findings
                self._night.pairs[variant, against, benchmark] = pair_up(theirs, mine)

    def _judge_fidelity(self) -> None:
        for (variant, against, benchmark), pairs in list(self._night.pairs.items()):
            if against == "accepted":
                measured = self._measured(pairs)
                self._night.pairs[variant, against, benchmark] = measured
                known = [pair.psnr_db for pair in measured if pair.psnr_db is not None]
                self._night.findings.append(judge_fidelity(self._gates.fidelity, variant, benchmark, known))

    def _judge_canary(self, canary: ResultStore, baseline: ResultStore) -> None:
        on_cpu = _devices(canary) == _devices(baseline) == ["cpu"]
        rows, references = _rows(canary), _rows(baseline)
        for benchmark, workload in self._plans.canary.workloads.items():
            mine = [row for row in rows if row["benchmark"] == benchmark]
            pairs = self._measured(pair_up([r for r in references if r["benchmark"] == benchmark], mine))
            self._night.pairs[BASELINE, "baseline", benchmark] = pairs
            expected = len(workload.prompts) * workload.images_per_prompt
            self._night.findings.append(judge_canary(self._gates.canary, benchmark, pairs, expected, on_cpu))

    def _measured(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with their PSNR, where both images are there. Equal digests need no look at the images."""

        def measured(pair: Pair) -> Pair:
            if not pair.row["image_path"] or not pair.reference["image_path"]:
                return pair
            if pair.row["image_digest"] == pair.reference["image_digest"]:
                return replace(pair, psnr_db=IDENTICAL_DB)
            images = [read_image(self._files.store(r["run"]), r["image_path"]) for r in (pair.reference, pair.row)]
            return replace(pair, psnr_db=psnr_db(*images))

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(measured, pairs))

    def _judge_costs(
        self, against: Against, tonight: ResultStore, reference: ResultStore, variants: Sequence[str] | None = None
    ) -> None:
        mine, theirs = _models(tonight), _models(reference)
        devices = (_devices(tonight), _devices(reference))
        other_device = None if devices[0] == devices[1] else f"on {devices[0]}, the reference on {devices[1]}"
        for variant in variants or self._plans.variants.variants:
            model, other = mine[variant], theirs[variant if against == "accepted" else BASELINE]
            for kind, gate, column in (
                ("latency", self._gates.latency, "seconds_per_image"),
                ("memory", self._gates.memory, "peak_memory_bytes"),
            ):
                limit = gate.against_accepted if against == "accepted" else gate.against_baseline
                if limit is not None:
                    finding = judge_ratio(kind, against, variant, model[column], other[column], limit, other_device)  # type: ignore[arg-type]
                    self._night.findings.append(finding)


def _rows(store: ResultStore) -> list[dict[str, Any]]:
    """The columns that are compared, and the run that each row is of."""
    return [{**row, "run": store.run_id} for row in store.read_rows().select(COLUMNS).to_pylist()]


def _evaluators(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each benchmark's evaluator, by the fingerprint in its rows."""
    return {row["benchmark"]: row["evaluator_fingerprint"] for row in rows if row["evaluator_fingerprint"]}


def _models(store: ResultStore) -> dict[str, dict[str, Any]]:
    return {model["variant"]: model for model in (store.manifest() or {})["models"]}


def _devices(store: ResultStore) -> list[str]:
    return (store.manifest() or {})["devices"]
