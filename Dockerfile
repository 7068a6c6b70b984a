# The server's image: every service of docker-compose.yml runs from it.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /build
# Only what decides about the dependencies, so that a change of the server's code does not install them again.
COPY pyproject.toml README.md LICENSE ./
COPY creditlane ./creditlane
RUN /opt/venv/bin/pip install ".[server]"

FROM python:3.12-slim
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN groupadd --system --gid 10001 creditlane \
    && useradd --system --uid 10001 --gid creditlane --home-dir /app --no-create-home --shell /usr/sbin/nologin creditlane
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
# Owned by root: the services may read their code, not change it.
COPY creditlane ./creditlane
COPY models ./models
COPY tasks ./tasks
COPY workers ./workers
COPY schedules ./schedules
COPY scripts ./scripts
# By number, so that a host can tell that it is not root: the user creditlane.
USER 10001:10001
# Celery shuts down warmly on it: what is in hand is finished, what is not goes back to the broker.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "celery", "--help"]
