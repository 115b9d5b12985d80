"""The command `mohge report`: one page about a training run or a model, or a comparison of several."""

import argparse
from pathlib import Path


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Raises:
        ValueError: for bad usage or input.
        OSError: if a file cannot be read or written.
    """
    if options.tokens < 2:
        raise ValueError(f"--tokens is {options.tokens}: it must be at least 2, a token and one to predict")
    sources = options.sources
    if repeated := next((source for source in sources if sources.count(source) > 1), None):
        raise ValueError(f"RUN_OR_MODEL names {repeated} twice: name each once")
    folder = Path(sources[0])
    path = Path(options.output or (folder if len(sources) == 1 and folder.is_dir() else Path()) / "report.html")
    # What draws and reads takes seconds to import, which other commands should not wait.
    from mohge.training.report.page import LINES, Report, is_page, render, render_comparison, write_page
    from mohge.training.report.record import measure_text, read_record

    if path.exists() and not is_page(path):
        raise FileExistsError(f"--output {path} exists and is no page of mohge report: name another file")
    if len(sources) > LINES:
        raise ValueError(f"RUN_OR_MODEL names {len(sources)}: compare at most {LINES}")
    reports, records = [], {source: read_record(source) for source in sources}
    for source, record in records.items():
        report = Report(source, record.config, record.history, record.traffic, record.routings)
        if options.text is not None:
            report.evaluation, report.tokenizer = measure_text(record, options.text, options.tokens)
            tokens = len(report.evaluation.token_ids)
            cut = "first " if tokens == options.tokens else ""
            report.text = f"{options.text}, {cut}{tokens:,} tokens"
        reports.append(report)
    write_page(render(reports[0]) if len(reports) == 1 else render_comparison(reports), path)
    print(f"page: {path}")
    return 0


__all__ = ["run"]
