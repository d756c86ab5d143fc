"""The sections of the report, one module each: a builder of what its template shows, with the template beside it."""

from __future__ import annotations

from deploy.report.sections import (
    engine,
    figures,
    frontier,
    gates,
    images,
    latency,
    noise,
    parity,
    provenance,
    sites,
)

SECTIONS = (gates, figures, images, sites, noise, parity, engine, latency, frontier, provenance)
"""In the order of the page, `templates/report.html.j2`."""
