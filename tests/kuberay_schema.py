"""A schema of the KubeRay fields that deploy/ uses, after the custom resources of KubeRay 1.7.0 (ray.io/v1).

Kubernetes drops or refuses a field that a resource does not have: here any that is not listed is refused. Pod templates
are Kubernetes' own and are checked as far as deploy/ uses them.
"""

from __future__ import annotations


def _object(required: str = "", **properties: dict) -> dict:
    """An object of these properties and no others. required: names, separated by blanks."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict) -> dict:
    return {"type": "array", "items": items}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_YES_NO = {"type": "boolean"}
# Every value of these is text: a bare number is refused.
_TEXTS = {"type": "object", "additionalProperties": _TEXT}

_CONTAINER = _object(
    "name image resources",
    name=_TEXT,
    image=_TEXT,
    env=_list(_object("name value", name=_TEXT, value=_TEXT)),
    resources=_object("requests limits", requests=_TEXTS, limits=_TEXTS),
    volumeMounts=_list(_object("name mountPath", name=_TEXT, mountPath=_TEXT)),
)
_VOLUME = _object("name", name=_TEXT, persistentVolumeClaim=_object("claimName", claimName=_TEXT))
_POD = _object(
    "containers",
    containers=_list(_CONTAINER),
    volumes=_list(_VOLUME),
    nodeSelector=_TEXTS,
    tolerations=_list(_object(key=_TEXT, operator={"enum": ["Exists", "Equal"]}, value=_TEXT, effect=_TEXT)),
    securityContext=_object(runAsNonRoot=_YES_NO, runAsUser=_COUNT, runAsGroup=_COUNT, fsGroup=_COUNT),
)
_TEMPLATE = _object("spec", metadata=_object(labels=_TEXTS, annotations=_TEXTS), spec=_POD)

_HEAD_GROUP = _object(
    "template",
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
)
_WORKER_GROUP = _object(
    "groupName minReplicas maxReplicas template",
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts=_COUNT,
    idleTimeoutSeconds=_COUNT,
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
)
_CLUSTER = _object(
    "headGroupSpec",
    rayVersion=_TEXT,
    authOptions=_object(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=_YES_NO,
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    headGroupSpec=_HEAD_GROUP,
    workerGroupSpecs=_list(_WORKER_GROUP),
)
RAY_JOB = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object("name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}),
    spec=_object(
        "entrypoint rayClusterSpec",
        entrypoint=_TEXT,
        runtimeEnvYAML=_TEXT,
        backoffLimit=_COUNT,
        activeDeadlineSeconds=_COUNT,
        shutdownAfterJobFinishes=_YES_NO,
        ttlSecondsAfterFinished=_COUNT,
        suspend=_YES_NO,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        rayClusterSpec=_CLUSTER,
    ),
)
