# A worker: the supervisor and the engine that owns the device. `TORCH_INDEX` picks the wheels: empty for those with CUDA.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY core core
COPY api api
COPY cli cli
COPY migrations migrations
COPY models/__init__.py models/__init__.py
COPY worker worker
RUN python -m venv /opt/bitmill \
 && /opt/bitmill/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} '.[worker]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/bitmill bitmill \
 && install -d -o bitmill -g bitmill /scratch
COPY --from=build /opt/bitmill /opt/bitmill
ENV PATH=/opt/bitmill/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    BITMILL_DATA_DIR=/var/lib/bitmill BITMILL_SCRATCH_DIR=/scratch
WORKDIR /var/lib/bitmill
USER 10001:10001
CMD ["python", "-m", "worker"]
