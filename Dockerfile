# Two images from one file:
#   docker build -t quantserve .                      CPU, every x86-64 level in one image
#   docker build -t quantserve:gpu --target gpu .     NVIDIA GPUs and CPU
# docs/deploy.md says how each step was tried and how to run them.

ARG PYTHON=3.12-slim-bookworm


# llama.cpp, compiled once for both images. Its backends become libraries of their own, one a processor generation; the best one
# is chosen when an engine starts. They are installed beside libllama.so, where the server looks for them.
FROM python:${PYTHON} AS llama
# Versions come from the distribution's release, which keeps only the newest of each package.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ ninja-build \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
ARG LLAMA_CPP="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_SUBPROCESS=OFF -DCMAKE_INSTALL_BINDIR=llama_cpp/lib -DCMAKE_INSTALL_LIBDIR=llama_cpp/lib -DCMAKE_INSTALL_INCLUDEDIR=llama_cpp/include"
RUN CMAKE_ARGS="${LLAMA_CPP}" \
    pip wheel --no-cache-dir --no-deps --constraint constraints.txt --wheel-dir /wheels llama-cpp-python


# What both images run, with everything that is installed in /opt/quantserve. EXTRA: a name of pyproject.toml's optional dependencies.
FROM python:${PYTHON} AS installed
WORKDIR /src
RUN python3 -m venv /opt/quantserve
COPY constraints.txt ./
COPY --from=llama /wheels /wheels
RUN /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt /wheels/*.whl
COPY pyproject.toml README.md LICENSE ./
COPY quant quant
COPY server server
RUN /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt .


# CUDA's libraries and its run-time compiler come as dependencies of torch, the driver from the machine.
FROM installed AS installed-gpu
RUN /opt/quantserve/bin/pip install --no-cache-dir --constraint constraints.txt '.[gpu]'


FROM python:${PYTHON} AS base
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home quantserve \
 && install --directory --owner quantserve /cache
WORKDIR /app
COPY models.yaml ./
COPY models models
ENV PATH=/opt/quantserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    QUANTSERVE_HOST=0.0.0.0 \
    QUANTSERVE_CACHE=/cache \
    HF_HOME=/cache/huggingface
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
  CMD ["/opt/quantserve/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["quantserve"]
CMD ["serve"]


FROM base AS gpu
COPY --from=installed-gpu /opt/quantserve /opt/quantserve
# What the NVIDIA container toolkit shall bring in.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility


FROM base AS cpu
COPY --from=installed /opt/quantserve /opt/quantserve
