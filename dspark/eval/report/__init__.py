"""Reports: result files of eval, bench, profile and audit on one page, as HTML and as Markdown."""

from __future__ import annotations

from dspark.eval.report.build import build_page
from dspark.eval.report.html import render_html
from dspark.eval.report.markdown import render_markdown
from dspark.eval.report.page import Page

__all__ = ["Page", "build_page", "render_html", "render_markdown"]
