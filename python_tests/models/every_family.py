"""All seven families behind one interface: a tiny model, inputs, and an artefact."""

from . import families, test_flux, test_pixart, tiny

EVERY = {
    "sd3": (
        tiny.make_model,
        lambda model, *a: tiny.make_inputs(*a),
        lambda m: tiny.make_artifact(tiny.varying_table()),
    ),
    "flux": (test_flux.make_model, test_flux.make_inputs, lambda m: test_flux.make_artifact(m, test_flux.table())),
    "pixart": (
        test_pixart.make_model,
        lambda model, *a: test_pixart.make_inputs(*a),
        lambda m: test_pixart.make_artifact(m, test_pixart.table()),
    ),
} | {
    name: (family.build, family.inputs, lambda m: families.make_artifact(m, families.table(4)))
    for name, family in families.FAMILIES.items()
}
