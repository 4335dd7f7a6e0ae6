"""`rwkv-es watch`, `report`, `runs`, `clean` and `apply`: commands about the folders of runs."""

from argparse import Namespace
from pathlib import Path

from rwkv_es.system.texts import expanded, printable

SEVERAL = Path("report.html")  # the page about several runs


def about_folders(verb: str, given: Namespace) -> None:
    """Run one of the commands with what its parser has read.

    Raises:
        ConfigError: a folder holds no run, or a file cannot be written or removed.
    """
    if verb == "runs":
        from rwkv_es.measure.folders import list_runs

        print(list_runs(Path(expanded(given.folder))))
        return
    if verb == "watch":
        from rwkv_es.measure.watch import watch

        watch(Path(expanded(given.run)))
        return
    if verb == "apply":
        from rwkv_es.verbs.history import apply

        apply(Path(expanded(given.base)), Path(expanded(given.ledger)), Path(expanded(given.out)), given.step)
        return
    runs = [Path(expanded(run)) for run in dict.fromkeys(given.run)]
    if verb == "clean":
        from rwkv_es.measure.folders import clean

        clean(runs, given.all, given.yes)
        return
    from rwkv_es.measure.page import write_report

    out = Path(expanded(given.out)) if given.out else SEVERAL if len(runs) > 1 else None
    print(printable(f"wrote {write_report(runs, out)}"))
