"""TeaCache's published polynomials, of degree 4, highest power first."""

# github.com/ali-vilab/TeaCache at 7c10efc, one script a model.
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "lumina-next": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "lumina-2": (225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552),
    "hidream-full": (-31360.5009, -712.425503, 49.1363285, 8.26515490, 0.108053901),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.14987800, 0.0961237896),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "cogvideox-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "cogvideox1.5-5b": (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": (122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
    "cosmos-7b": (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
    "open-sora-1.2": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
    "open-sora-plan": (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469),
    "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
    "wan2.1-t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p": (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan2.1-i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "wan2.1-t2v-1.3b-retention": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan2.1-t2v-14b-retention": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
    "wan2.1-i2v-480p-retention": (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
    "wan2.1-i2v-720p-retention": (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
}

# The published scripts that these families' diffusers classes correspond to, where there is only one.
BY_CLASS = {"FluxTransformer2DModel": "flux"}

IDENTITY = "identity"  # the indicator's change itself


def coefficients_of(name: str) -> tuple[float, ...]:
    """A published polynomial by its name, or that of :data:`IDENTITY`.

    Raises:
        ValueError: there is none of this name.
    """
    if name == IDENTITY:
        return (1.0, 0.0)
    if name not in COEFFICIENTS:
        raise ValueError(
            f"TeaCache: there are no published coefficients called {name!r}, only {', '.join(COEFFICIENTS)}, and "
            f"{IDENTITY!r}; fit some with `shiva calibrate teacache`"
        )
    return COEFFICIENTS[name]
