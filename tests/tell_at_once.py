"""A plugin for `pytest -p tests.tell_at_once`: a failure is told when it happens, for runs that may be cut short."""


def pytest_runtest_logreport(report):
    if report.failed:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", flush=True)
