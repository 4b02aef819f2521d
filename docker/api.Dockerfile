# The API, the reconciler and the migrations: no torch, no root.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY core core
COPY api api
COPY cli cli
COPY migrations migrations
COPY models/__init__.py models/__init__.py
COPY worker worker
RUN python -m venv /opt/bitmill \
 && /opt/bitmill/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/bitmill bitmill
COPY --from=build /opt/bitmill /opt/bitmill
ENV PATH=/opt/bitmill/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 BITMILL_DATA_DIR=/var/lib/bitmill
WORKDIR /var/lib/bitmill
USER 10001:10001
EXPOSE 8642
CMD ["python", "-m", "uvicorn", "api.main:create_app", "--factory", "--host", "0.0.0.0", "--port", "8642"]
