"""The sections of the report, one module each: a builder of what its template shows, with the template beside it."""

from __future__ import annotations

from deploy.report.sections import frontier, gates, images, latency, noise, parity, sites

SECTIONS = (gates, images, sites, noise, parity, latency, frontier)
"""In the order of the page, `templates/report.html.j2`; the templates of the others show results as they are."""
