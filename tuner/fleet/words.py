"""The fleet in words: what was found, what must be known before it is trusted, and everything that was assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.fleet.fleet import Fleet
from tuner.fleet.headroom import ROUTINGS
from tuner.words import figure

if TYPE_CHECKING:
    from tuner.fleet.account import Account
    from tuner.fleet.offer import Offer

BURSTY = 1.3  # arrivals whose gaps vary by more than independent ones (1) and a short window's chance
LISTED = 24  # hours that are named in a sentence
OTHER = 1.1  # a trace whose outputs are longer or shorter by this factor is another traffic


def percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def verdict(fleet: Fleet) -> str:
    """Whether the simulated day holds, and the hours in which it does not."""
    hours, missed, spare = len(fleet.demand), fleet.missed, fleet.terms.spare
    lost = f", with {spare} replica{'s' * (spare > 1)} lost all the time" if spare else ""
    text = f"Simulated {fleet.day.how}{lost}: "
    if missed:
        named = _listed([f"{fleet.demand.labels[h]} ({worst(fleet, h)})" for h in missed])
        text += f"the SLOs are missed in {len(missed)} of {hours} hours: {named}."
    else:
        text += f"the SLOs hold in each of the {hours} hours." if hours > 1 else "the SLOs hold in the one hour."
    if fleet.raised:
        raised = _listed([fleet.demand.labels[h] for h in fleet.raised])
        text += f" Given more than the headroom asked for, because a first plan missed there: {raised}."
    return text


def _listed(hours: Sequence[str]) -> str:
    left = len(hours) - LISTED
    return ", ".join(hours[:LISTED]) + (f" and {left:,} more (--json has them all)" if left > 0 else "")


def worst(fleet: Fleet, hour: int) -> str:
    """The SLO that the simulation misses most in ``hour``, with what it counted."""
    day = fleet.day
    i = max(range(len(day.limits)), key=lambda i: day.counted[i, hour] / max(day.limits[i].allowed, 1e-9))
    limit, counted = day.limits[i], float(day.counted[i, hour])
    if limit.slo.quantile is not None and limit.slo.latency:
        return f"{limit.slo}: {percent(counted)} of the requests beyond it, {percent(limit.allowed)} allowed"
    return f"{limit.slo.metric} {limit.slo.show(counted * limit.slo.limit if limit.slo.latency else counted)}"


def totals(found: Account) -> tuple[str, ...]:
    """Cost and energy of the day."""
    per = [
        f"{figure(usd, 4)} USD per million {name} tokens"
        for usd, name in ((found.usd_per_mtok_output, "output"), (found.usd_per_mtok_total, "total"))
        if math.isfinite(usd)
    ]
    lines = [f"{found.usd_per_day:,.2f} USD a day" + (f" ({', '.join(per)})." if per else ".")]
    level = found.level_usd_per_day
    saved = 1 - found.usd_per_day / level if level > 0 else 0.0
    if saved > 0.0005:
        lines.append(f"The dearest hour's fleet all day: {level:,.2f} USD; scaling saves {percent(saved)}.")
    if found.kwh_per_day is None or found.j_per_output_token is None:
        lines.append("GPU energy: not known, because not every kind in use has its power measured.")
    else:
        lines.append(
            f"GPU energy: {figure(found.kwh_per_day, 4)} kWh a day, {figure(found.j_per_output_token)} J/output token."
        )
    return tuple(lines)


def warnings(fleet: Fleet) -> tuple[str, ...]:
    """What a reader must know before trusting the figures."""
    found = []
    emulated = [o.name for o in fleet.offers if o.emulated]
    if emulated:
        found.append(f"Emulated: {', '.join(emulated)}. A model of the hardware answered; nothing was measured.")
    found += fleet.shop.notes
    if fleet.shop.unchecked:
        found.append(f"Not simulated, because no mean tells it: {', '.join(map(str, fleet.shop.unchecked))}.")
    found += _traffic(fleet)
    if fleet.plan.gap > 1e-6:
        found.append(f"The plan is within {fleet.plan.gap * 100:.2g} % of the cheapest: the solver stopped there.")
    return tuple(found)


def _traffic(fleet: Fleet) -> Sequence[str]:
    found, outputs = [], fleet.demand.output_tokens
    for offer in fleet.offers:
        if offer.cv > BURSTY:
            found.append(f"{offer.name} was measured with arrivals burstier than independent ones: cautious here.")
        factor = offer.output_tokens / outputs if outputs > 0 else math.nan
        if math.isfinite(factor) and not 1 / OTHER <= factor <= OTHER:
            found.append(
                f"{offer.name} was measured with {offer.output_tokens:.0f} output tokens per request, the demand's "
                f"trace has {outputs:.0f}: what it serves of this trace was not measured. Tune with the same trace."
            )
    return found


def _before(offers: Sequence[Offer]) -> str:
    """What the measurements' prefix caches held of the time before their windows."""
    cold = [offer.name for offer in offers if not offer.filled]
    if not cold:
        return " and what came before it"
    return " and none from before it" + (f" ({', '.join(cold)})" if len(cold) < len(offers) else "")


def assumptions(fleet: Fleet) -> tuple[str, ...]:
    """What the plan takes for granted, one sentence or two each."""
    terms, traffic = fleet.terms, fleet.traffic
    found = [
        f"Demand: {fleet.demand.source}. Requests arrive independently, and {_swing(fleet)}. After the last hour comes "
        "the first.",
        f"Routing: {ROUTINGS[traffic.routing]}. No request is retried. As many prefixes are found cached as in the "
        f"measurement, where one server saw all requests of a window{_before(fleet.offers)}.",
        f"Every replica is as slow as the lower limit of its measured capacity ({percent(fleet.confidence)}, "
        "one-sided). Beyond the highest measured load it completes no more than there.",
        "Tokens are those of all requests, the few beyond a limit too.",
    ]
    found += [f"{o.name}: {o.basis}. Ready {o.start_s:.0f} s after its launch." for o in fleet.offers]
    found.append(_scaling(fleet))
    if terms.spare:
        found.append(
            f"{terms.spare} spare: every hour still holds when so many replicas of the largest kind in use are lost. "
            "The simulation runs without them."
        )
    else:
        found.append("No spare: a lost replica may miss the SLOs.")
    if terms.spot_share > 0:
        found.append(
            f"Spot: at most {percent(terms.spot_share)} of the capacity, at {percent(terms.spot_price)} of the price. "
            f"Each is taken away {terms.interruptions_per_hour:g} times an hour, without warning and independently of "
            "the others; its requests begin again elsewhere, and its successor is ready after one start-up."
        )
    found.append("Prices are those of the studies; nothing is paid for traffic, storage or a load balancer.")
    return tuple(found)


def rate(rps: float, largest: float) -> str:
    """Requests per second in a column whose largest figure is ``largest``: at least three digits of that."""
    return f"{rps:,.{max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 0}f}"


def _swing(fleet: Fleet) -> str:
    traffic = fleet.traffic
    if not traffic.swing:
        return "their rate is constant within an hour (--swing says otherwise)"
    return f"their rate swings by {percent(traffic.swing)} between stretches of {traffic.window_s:g} s"


def _scaling(fleet: Fleet) -> str:
    terms = fleet.terms
    if math.isinf(terms.lead_s):
        text = "Scaling: the curve is known, so replicas are ready when the hour begins; start-ups are paid"
    else:
        text = (
            f"Scaling knows {terms.lead_s:g} s ahead what is needed; a replica that takes longer to start is paid, but "
            "serves nothing in the hours in which it starts"
        )
    if terms.min_uptime_h > 1:
        text += f"; a replica runs for at least {terms.min_uptime_h} h"
    if terms.hold_h:
        text += f"; the fleet keeps what it needed for {terms.hold_h} h more"
    return text + "."
