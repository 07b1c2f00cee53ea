"""One self-contained HTML page per slide (`slide`), and one per cohort (`cohort`). docs/report.md shows both."""
