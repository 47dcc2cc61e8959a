"""Where the tests begin: the long ones first, so that several workers end at about the same time."""

LONG = (
    "test_simulated.py",
    "test_compile.py",
    "test_processes.py",
    "test_fit.py",
    "test_resume.py",
    "test_export.py",
    "test_families.py",
    "test_registration.py",
    "test_simt.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
