# docker build -t sonoscope .
# docker run --rm -it --gpus all --shm-size=2g -v /path/to/clips:/clips:ro sonoscope
FROM python:3.12-slim

# git for DVC; libGL and GLib for opencv-python; make for the Makefile.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git libgl1 libglib2.0-0 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /sonoscope
# The requirements first, so that a change of the code does not download torch again.
COPY Makefile pyproject.toml requirements.lock requirements-headless.lock README.md LICENSE ./
COPY pipeline/__init__.py pipeline/
RUN make install
COPY . .
ENV PATH="/sonoscope/.venv/bin:$PATH"

CMD ["make", "demo"]
